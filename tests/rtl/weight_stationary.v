// A weight-stationary systolic array with its controller: y[M, N] = a[M, K] x w[K, N], int8 in, int32 out.
//
// R x C cells. A weight enters at the top of its column and moves down one cell a cycle until it has reached its row,
// where it waits in a shadow register; the first activation of a tile carries the mark that makes it the cell's weight.
// Activations move to the right, one row of k each, skewed by a cycle per row; sums move down, skewed by a cycle per
// column, and are added to the accumulators below. With DOUBLE the weights of the next tile enter while this one
// computes; without it they wait until the last sum has left.

module cell_ws (
    input wire clk,
    input wire signed [7:0] a_in, input wire a_first, input wire a_valid,
    output reg signed [7:0] a_out, output reg a_first_out, output reg a_valid_out,
    input wire signed [7:0] w_in, input wire [15:0] hops_in, input wire w_valid,
    output reg signed [7:0] w_out, output reg [15:0] hops_out, output reg w_valid_out,
    input wire signed [31:0] sum_in, output reg signed [31:0] sum_out
);
    reg signed [7:0] weight, shadow;
    wire signed [7:0] used = a_first ? shadow : weight;
    initial begin w_valid_out = 0; a_valid_out = 0; a_first_out = 0; a_out = 0; sum_out = 0; weight = 0; shadow = 0; end
    always @(posedge clk) begin
        a_out <= a_in;
        a_first_out <= a_first;
        a_valid_out <= a_valid;
        sum_out <= sum_in + a_in * used;
        if (a_first) weight <= shadow;
        if (w_valid && hops_in == 0) shadow <= w_in;
        w_out <= w_in;
        hops_out <= hops_in - 1;
        w_valid_out <= w_valid && hops_in != 0;
    end
endmodule

module bench;
    parameter R = 4, C = 4, DOUBLE = 0, LIMIT = 4096;
    reg clk = 0;
    integer m_size, k_size, n_size, k_tiles, n_tiles, tiles, cycle, i, j, file;
    reg signed [7:0] a [0:LIMIT-1], w [0:LIMIT-1];
    reg signed [31:0] y [0:LIMIT-1];

    // The cycle in which a tile's weights begin to enter, and its activations; NEVER until that is so.
    parameter NEVER = 1 << 30;
    integer load_at [0:LIMIT-1], start_at [0:LIMIT-1], left [0:C-1];
    integer tile, row, k, n, last, loads, starts, first;

    reg signed [7:0] a_edge [0:R-1], w_edge [0:C-1];
    reg first_edge [0:R-1], row_edge [0:R-1], valid_edge [0:C-1];
    reg [15:0] hops_edge [0:C-1];

    wire signed [7:0] a_wire [0:R*(C+1)-1], w_wire [0:(R+1)*C-1];
    wire first_wire [0:R*(C+1)-1], row_wire [0:R*(C+1)-1], valid_wire [0:(R+1)*C-1];
    wire [15:0] hops_wire [0:(R+1)*C-1];
    wire signed [31:0] sum_wire [0:(R+1)*C-1];
    genvar gi, gj;
    generate
        for (gi = 0; gi < R; gi = gi + 1) begin : edge_rows
            assign a_wire[gi*(C+1)] = a_edge[gi];
            assign first_wire[gi*(C+1)] = first_edge[gi];
            assign row_wire[gi*(C+1)] = row_edge[gi];
        end
        for (gj = 0; gj < C; gj = gj + 1) begin : edge_columns
            assign w_wire[gj] = w_edge[gj];
            assign valid_wire[gj] = valid_edge[gj];
            assign hops_wire[gj] = hops_edge[gj];
            assign sum_wire[gj] = 0;
        end
        for (gi = 0; gi < R; gi = gi + 1) begin : rows
            for (gj = 0; gj < C; gj = gj + 1) begin : columns
                cell_ws one (
                    .clk(clk),
                    .a_in(a_wire[gi*(C+1)+gj]), .a_out(a_wire[gi*(C+1)+gj+1]),
                    .a_first(first_wire[gi*(C+1)+gj]), .a_first_out(first_wire[gi*(C+1)+gj+1]),
                    .a_valid(row_wire[gi*(C+1)+gj]), .a_valid_out(row_wire[gi*(C+1)+gj+1]),
                    .w_in(w_wire[gi*C+gj]), .hops_in(hops_wire[gi*C+gj]), .w_valid(valid_wire[gi*C+gj]),
                    .w_out(w_wire[(gi+1)*C+gj]), .hops_out(hops_wire[(gi+1)*C+gj]),
                    .w_valid_out(valid_wire[(gi+1)*C+gj]),
                    .sum_in(sum_wire[gi*C+gj]), .sum_out(sum_wire[(gi+1)*C+gj])
                );
            end
        end
    endgenerate

    task control;  // what may begin in this cycle
        begin
            if (loads < tiles && (loads == 0 || (!DOUBLE && left[C-1] == loads * m_size)))
            begin
                load_at[loads] = cycle;
                loads = loads + 1;
            end
            if (starts < loads && cycle >= load_at[starts] + R && (starts == 0 || cycle >= start_at[starts-1] + m_size))
            begin
                start_at[starts] = cycle;
                starts = starts + 1;
                if (DOUBLE && loads < tiles) begin
                    load_at[loads] = cycle;
                    loads = loads + 1;
                end
            end
        end
    endtask

    task drive;  // what enters the array in this cycle
        begin
            for (i = 0; i < R; i = i + 1) begin a_edge[i] = 0; first_edge[i] = 0; row_edge[i] = 0; end
            for (j = 0; j < C; j = j + 1) begin w_edge[j] = 0; valid_edge[j] = 0; hops_edge[j] = 0; end
            for (tile = first; tile < loads; tile = tile + 1) begin
                for (i = 0; i < R; i = i + 1) begin
                    row = cycle - start_at[tile] - i;
                    k = (tile % k_tiles) * R + i;
                    if (row >= 0 && row < m_size) begin
                        a_edge[i] = k < k_size ? a[row*k_size+k] : 0;
                        first_edge[i] = row == 0;
                        row_edge[i] = 1;
                    end
                end
                for (j = 0; j < C; j = j + 1) begin
                    row = cycle - load_at[tile] - j;
                    k = (tile % k_tiles) * R + row;
                    n = (tile / k_tiles) * C + j;
                    if (row >= 0 && row < R) begin
                        w_edge[j] = k < k_size && n < n_size ? w[k*n_size+n] : 0;
                        valid_edge[j] = 1;
                        hops_edge[j] = row;
                    end
                end
            end
        end
    endtask

    task collect;  // sums that left the array at the end of this cycle, in the order of tiles and rows
        begin
            for (j = 0; j < C; j = j + 1)
                if (marks[j]) begin
                    row = left[j] % m_size;
                    n = (left[j] / m_size / k_tiles) * C + j;
                    if (n < n_size) y[row*n_size+n] = y[row*n_size+n] + bottoms[j];
                    left[j] = left[j] + 1;
                    last = cycle + 1;
                end
            while (first < tiles && left[C-1] >= (first + 1) * m_size) first = first + 1;
        end
    endtask

    reg signed [31:0] bottoms [0:C-1];
    reg marks [0:C-1];
    generate
        for (gj = 0; gj < C; gj = gj + 1) begin : out
            always @(sum_wire[R*C+gj]) bottoms[gj] = sum_wire[R*C+gj];
            always @(row_wire[(R-1)*(C+1)+gj+1]) marks[gj] = row_wire[(R-1)*(C+1)+gj+1];
            initial begin bottoms[gj] = 0; marks[gj] = 0; left[gj] = 0; end
        end
    endgenerate

    initial begin
        if (!$value$plusargs("m=%d", m_size) || !$value$plusargs("k=%d", k_size) || !$value$plusargs("n=%d", n_size))
            $finish;
        $readmemh("a.hex", a, 0, m_size * k_size - 1);
        $readmemh("w.hex", w, 0, k_size * n_size - 1);
        for (i = 0; i < m_size * n_size; i = i + 1) y[i] = 0;
        k_tiles = (k_size + R - 1) / R;
        n_tiles = (n_size + C - 1) / C;
        tiles = k_tiles * n_tiles;
        for (tile = 0; tile < tiles; tile = tile + 1) begin load_at[tile] = NEVER; start_at[tile] = NEVER; end
        last = 0; loads = 0; starts = 0; first = 0;
        for (cycle = 0; left[C-1] < tiles * m_size; cycle = cycle + 1) begin
            control;
            drive;
            #1 clk = 1;
            #1 clk = 0;
            collect;
        end
        $display("cycles %0d", last);
        file = $fopen("y.txt", "w");
        for (i = 0; i < m_size * n_size; i = i + 1) $fdisplay(file, "%0d", y[i]);
        $fclose(file);
        $finish;
    end
endmodule
