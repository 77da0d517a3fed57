// An output-stationary systolic array with its controller: y[M, N] = a[M, K] x w[K, N], int8 in, int32 out.
//
// R x C cells, each the sum of one output. Activations move to the right and weights down, one cell a cycle, both
// skewed, so that element k of both meets in cell (i, j) in cycle k + i + j. A tile is done when the last cell has
// added its last product; the next tile's first operands clear each sum that they reach, after it was read.

module cell_os (
    input wire clk, input wire first, input wire valid, input wire ends,
    output reg first_out, output reg valid_out, output reg ends_out,
    input wire signed [7:0] a_in, output reg signed [7:0] a_out,
    input wire signed [7:0] w_in, output reg signed [7:0] w_out,
    output reg signed [31:0] sum
);
    initial begin first_out = 0; valid_out = 0; ends_out = 0; a_out = 0; w_out = 0; sum = 0; end
    always @(posedge clk) begin
        a_out <= a_in;
        w_out <= w_in;
        first_out <= first;
        valid_out <= valid;
        ends_out <= ends;
        if (valid) sum <= (first ? 0 : sum) + a_in * w_in;
    end
endmodule

module bench;
    parameter R = 4, C = 4, LIMIT = 4096;
    reg clk = 0;
    integer m_size, k_size, n_size, m_tiles, n_tiles, tiles, cycle, step, i, j, k, m, n, tile, file;
    reg signed [7:0] a [0:LIMIT-1], w [0:LIMIT-1];
    reg signed [31:0] y [0:LIMIT-1];
    reg signed [7:0] a_edge [0:R-1], w_edge [0:C-1];
    reg first_edge [0:R-1], valid_edge [0:R-1], ends_edge [0:R-1], done;
    wire signed [7:0] a_wire [0:R*(C+1)-1], w_wire [0:(R+1)*C-1];
    wire first_wire [0:R*(C+1)-1], valid_wire [0:R*(C+1)-1], ends_wire [0:R*(C+1)-1];
    wire corner = ends_wire[R*(C+1)-1];  // the last cell has its last product
    wire signed [31:0] sum_wire [0:R*C-1];
    reg signed [31:0] sums [0:R*C-1];
    genvar gi, gj;
    generate
        for (gi = 0; gi < R; gi = gi + 1) begin : edge_rows
            assign a_wire[gi*(C+1)] = a_edge[gi];
            assign first_wire[gi*(C+1)] = first_edge[gi];
            assign valid_wire[gi*(C+1)] = valid_edge[gi];
            assign ends_wire[gi*(C+1)] = ends_edge[gi];
        end
        for (gj = 0; gj < C; gj = gj + 1) begin : edge_columns
            assign w_wire[gj] = w_edge[gj];
        end
        for (gi = 0; gi < R; gi = gi + 1) begin : rows
            for (gj = 0; gj < C; gj = gj + 1) begin : columns
                cell_os one (
                    .clk(clk), .first(first_wire[gi*(C+1)+gj]), .valid(valid_wire[gi*(C+1)+gj]),
                    .ends(ends_wire[gi*(C+1)+gj]), .first_out(first_wire[gi*(C+1)+gj+1]),
                    .valid_out(valid_wire[gi*(C+1)+gj+1]), .ends_out(ends_wire[gi*(C+1)+gj+1]),
                    .a_in(a_wire[gi*(C+1)+gj]), .a_out(a_wire[gi*(C+1)+gj+1]),
                    .w_in(w_wire[gi*C+gj]), .w_out(w_wire[(gi+1)*C+gj]), .sum(sum_wire[gi*C+gj])
                );
                initial sums[gi*C+gj] = 0;
                always @(sum_wire[gi*C+gj]) sums[gi*C+gj] = sum_wire[gi*C+gj];
            end
        end
    endgenerate

    initial begin
        if (!$value$plusargs("m=%d", m_size) || !$value$plusargs("k=%d", k_size) || !$value$plusargs("n=%d", n_size))
            $finish;
        $readmemh("a.hex", a, 0, m_size * k_size - 1);
        $readmemh("w.hex", w, 0, k_size * n_size - 1);
        m_tiles = (m_size + R - 1) / R;
        n_tiles = (n_size + C - 1) / C;
        tiles = m_tiles * n_tiles;
        cycle = 0;
        for (tile = 0; tile < tiles; tile = tile + 1) begin
            done = 0;
            for (step = 0; !done; step = step + 1) begin
                for (i = 0; i < R; i = i + 1) begin
                    k = step - i;
                    m = (tile / n_tiles) * R + i;
                    valid_edge[i] = k >= 0 && k < k_size;
                    first_edge[i] = k == 0;
                    ends_edge[i] = k == k_size - 1;
                    a_edge[i] = valid_edge[i] && m < m_size ? a[m*k_size+k] : 0;
                end
                for (j = 0; j < C; j = j + 1) begin
                    k = step - j;
                    n = (tile % n_tiles) * C + j;
                    w_edge[j] = k >= 0 && k < k_size && n < n_size ? w[k*n_size+n] : 0;
                end
                #1 clk = 1;
                #1 clk = 0;
                cycle = cycle + 1;
                done = corner;
            end
            for (i = 0; i < R; i = i + 1)
                for (j = 0; j < C; j = j + 1) begin
                    m = (tile / n_tiles) * R + i;
                    n = (tile % n_tiles) * C + j;
                    if (m < m_size && n < n_size) y[m*n_size+n] = sums[i*C+j];
                end
        end
        $display("cycles %0d", cycle);
        file = $fopen("y.txt", "w");
        for (i = 0; i < m_size * n_size; i = i + 1) $fdisplay(file, "%0d", y[i]);
        $fclose(file);
        $finish;
    end
endmodule
