"""Values that are quantised by one static scale wherever they are read exist as integers alone.

A product writes the integers itself: its scales and its bias are given in units of the result's scale, with the zero
points of activations, residual and result in the bias, and the result is rounded and saturates. Residuals are read as
integers. A largest value commutes with a quantisation, so that pools move behind it. A sum of dequantised values that
is quantised again is one elementwise operator on integers. Saturation stands for a lower bound of 0 where the zero
point is the least integer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np

from firsttoken_compiler.isa.program import Packing
from firsttoken_compiler.isa.types import Dtype
from firsttoken_compiler.isa.vector_kernel import MAX_SOURCES, Expr, VectorKernel
from firsttoken_compiler.passes.cache_norms import without_dead
from firsttoken_compiler.passes.canonicalise import Canonical
from firsttoken_compiler.passes.quantise import Quantised
from firsttoken_compiler.passes.quantised_patterns import DEQUANTISE, QUANTISE
from firsttoken_compiler.passes.rebuild import Rebuild, reads, rebuild
from firsttoken_compiler.schedule.definitions import MIN_SCALE, QMAX, linear_names
from firsttoken_compiler.schedule.spec import KernelSpec
from firsttoken_compiler.tvm import dialect
from firsttoken_compiler.tvm.api import Call, IRModule, dtype_of, operator_name, relax, shape_of

LOW: Final = -128
HIGH: Final = 127
_QUANTISE: Final = QUANTISE.format(low=LOW, high=HIGH)
_DEQUANTISE: Final = DEQUANTISE.format(value="s0")
PRODUCTS: Final = ("npu.linear", "npu.conv")
ELEMENTWISE: Final = ("npu.add", "npu.map")
Columns = Callable[[Packing, Dtype], np.ndarray | None]
"""What a recipe of stored weights makes, `[rows, n]`; None where the data is not here."""


@dataclass(frozen=True)
class Grid:
    """What integers stand for: `(q - zero) * scale`."""

    scale: float
    zero: float


@dataclass(frozen=True)
class IntegerImages:
    """See the module's docstring. Modules without static scales stay as they are.

    `largest`: ONNX node → the largest magnitude of its result, which gives residuals a scale that nothing else reads.
    `columns`: of stored weights, for the sums that zero points are multiplied by. `weights`: parameter → initialiser.
    Results of products are within one step of those that are quantised apart, as these scale twice.
    """

    columns: Columns
    weights: Mapping[str, str]
    largest: Mapping[str, float] = field(default_factory=dict)

    def run(self, quantised: Quantised, canonical: Canonical) -> tuple[Quantised, Canonical]:
        """The rewritten module; operators that moved into others leave these their ONNX nodes."""
        state = _State(quantised, canonical, self.columns, self.weights, self.largest)
        state.plan()
        if not state.grids and not state.sums:
            return quantised, canonical
        return state.run()


@dataclass
class _State:
    quantised: Quantised
    canonical: Canonical
    columns: Columns
    weights: Mapping[str, str]
    largest: Mapping[str, float]
    values: dict[Any, Any] = field(default_factory=dict)
    readers: dict[Any, list[tuple[Any, int]]] = field(default_factory=dict)
    """Value → (variable that reads it, number of the operand); (None, 0) where the graph returns it."""
    grids: dict[Any, Grid] = field(default_factory=dict)
    """Float values that become integers → what these stand for."""
    sums: dict[Any, Any] = field(default_factory=dict)
    """Quantisation → the elementwise operator that moves into it."""
    absorbed: set[Any] = field(default_factory=set)
    """Quantisations that their operands became."""
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    parameters: dict[str, Any] = field(default_factory=dict)
    packings: dict[str, Packing] = field(default_factory=dict)
    joined: dict[str, list[str]] = field(default_factory=dict)
    """Variable → variables whose nodes it now computes too."""

    def plan(self) -> None:
        """What becomes integers, readers before what they read."""
        bindings = [binding for block in self.quantised.module["main"].body.blocks for binding in block.bindings]
        self.values = {binding.var: binding.value for binding in bindings[:-1]}
        for binding in bindings[:-1]:
            for index, part in enumerate(reads(binding.value)):
                self.readers.setdefault(part, []).append((binding.var, index))
        for part in bindings[-1].value.fields:
            self.readers.setdefault(part, []).append((None, 0))
        for variable in reversed(list(self.values)):
            grid = self._grid_of(variable)
            if grid is not None:
                self.grids[variable] = grid
                read_by = [reader for reader, _ in self.readers[variable] if self._quantises(reader) is not None]
                self.absorbed.update(read_by)
                self.joined.setdefault(variable.name, []).extend(reader.name for reader in read_by)
        for variable, value in self.values.items():
            if variable not in self.absorbed and self._quantises(variable) is not None and self._is_sum(value.args[0]):
                self.sums[variable] = value.args[0]
                self.joined.setdefault(variable.name, []).append(value.args[0].name)

    # What operators are.

    def _number(self, value: Any) -> float | None:
        """A constant with one element."""
        held = self.canonical.constants.get(value.name) if isinstance(value, relax.Var) else None
        return float(held.reshape(-1)[0]) if held is not None and held.size == 1 else None

    def _quantises(self, variable: Any) -> Grid | None:
        """What a quantisation to int8 by a constant scale makes; None for anything else."""
        value = self.values.get(variable)
        if not isinstance(value, Call):
            return None
        if value.op.name == "npu.map" and str(value.attrs["expr"]) == _QUANTISE and dtype_of(value) == "int8":
            scale, zero = (self._number(part) for part in value.args[1:3])
            return None if scale is None or zero is None else Grid(scale, zero)
        if value.op.name == "npu.quantise" and "static" in value.attrs and dtype_of(value) == "int8":
            inverse = self._number(value.args[1])
            return None if inverse is None else Grid(1.0 / inverse, 0.0)
        return None

    def _dequantises(self, variable: Any) -> tuple[Any, Grid] | None:
        """(integers, what they stand for) that a value is made of."""
        value = self.values.get(variable)
        if not (isinstance(value, Call) and value.op.name == "npu.map" and str(value.attrs["expr"]) == _DEQUANTISE):
            return None
        scale, zero = (self._number(part) for part in value.args[1:3])
        if dtype_of(value.args[0]) != "int8" or scale is None or zero is None:
            return None
        return value.args[0], Grid(scale, zero)

    def _names(self, call: Any) -> Sequence[str]:
        params = tuple(dialect.plain_attributes(call).items())
        return linear_names(KernelSpec("linear", params, (), ()))

    def _integers(self, value: Any) -> tuple[Any, Grid] | None:
        """(value in the new module, what its integers stand for) of a value that is, or becomes, integers."""
        if value in self.grids:
            return value, self.grids[value]
        return self._dequantises(value)

    def _grid_of(self, variable: Any) -> Grid | None:
        """What all readers quantise a value to, where the operator that makes it can write that.

        Where the graph itself says what is quantised, what it does not quantise stays a float.
        """
        call, readers = self.values[variable], self.readers.get(variable, [])
        if operator_name(call) not in (*PRODUCTS, "npu.pool") or dtype_of(variable) == "int8":
            return None
        grids, ours = set[Grid](), True
        for reader, index in readers:
            grid = self._quantises(reader)
            if grid is not None:
                grids.add(grid)
                ours = ours and operator_name(self.values[reader]) == "npu.quantise"
            elif self._is_max_pool(reader) and reader in self.grids and len(readers) == 1:
                grids.add(self.grids[reader])
            elif not self._is_residual(reader, index):
                return None
        residuals = any(self._is_residual(*pair) for pair in readers)
        if not grids and residuals:
            grids.update(self._given(variable))
        if len(grids) != 1 or (residuals and not ours):
            return None
        (grid,) = grids
        if operator_name(call) == "npu.pool":
            return grid if self._is_max_pool(variable) and self._pools_integers(call.args[0], variable, grid) else None
        return grid if self._writes_integers(call, grid) else None

    def _given(self, variable: Any) -> Iterator[Grid]:
        """The scale that the options give a value."""
        nodes = self.canonical.nodes.get(self.quantised.names.get(variable.name, variable.name), ())
        if nodes and nodes[-1] in self.largest:
            yield Grid(max(self.largest[nodes[-1]] / QMAX["int8"], MIN_SCALE), 0.0)

    def _is_residual(self, reader: Any, index: int) -> bool:
        """Whether it is read as the residual of a product that can multiply it by a scale."""
        call: Any = self.values.get(reader)
        if operator_name(call) not in PRODUCTS or self._names(call)[index] != "residual":
            return False
        alone = len(call.args) - 1 == index and len(call.args) <= MAX_SOURCES  # nothing follows it, and a port is free
        return reader in self.grids or (str(call.attrs["acts"]) == "int8" and alone)

    def _is_max_pool(self, variable: Any) -> bool:
        call: Any = self.values.get(variable)
        return operator_name(call) == "npu.pool" and str(call.attrs["mode"]) == "max"

    def _pools_integers(self, source: Any, pool: Any, grid: Grid) -> bool:
        """Whether what a pool reads is of its result's integers, or a product that only the pool reads."""
        made = self._dequantises(source)
        if made is not None:
            return made[1] == grid
        call = self.values.get(source)
        alone = [reader for reader, _ in self.readers[source]] == [pool]
        return alone and operator_name(call) in PRODUCTS and self._writes_integers(call, grid)

    def _writes_integers(self, call: Any, grid: Grid) -> bool:
        """Whether a product's last instruction can round to integers: all that it adds and multiplies is known."""
        attrs = dialect.plain_attributes(call)
        plain = not any(attrs.get(name) for name in ("silu", "factor", "blocks", "zeros", "minimum", "narrow"))
        if not plain or attrs["acts"] != "int8" or int(attrs["bits"]) != 8 or int(attrs["group"]) < int(attrs["k"]):
            return False
        operands = dict(zip(self._names(call), call.args, strict=True))
        if self._number(operands["a_scale"]) is None or "w_scale" not in operands:
            return False
        if "a_zero" in operands and self._zero_point(operands) is None:
            return False
        known = "bias" not in operands or operands["bias"].name in self.canonical.constants
        return known or (not self._shifts(operands, grid) and operands["bias"].name in self.quantised.plain)

    def _shifts(self, operands: Mapping[str, Any], grid: Grid) -> bool:
        """Whether zero points make a bias of their own."""
        integers = self._integers(operands["residual"]) if "residual" in operands else None
        return bool(grid.zero or "a_zero" in operands or (integers is not None and integers[1].zero))

    def _is_sum(self, source: Any) -> bool:
        """Whether a value that one quantisation reads is an elementwise operator that can read integers."""
        call: Any = self.values.get(source)
        if operator_name(call) not in ELEMENTWISE or len(self.readers[source]) != 1:
            return False
        made = [self._dequantises(part) for part in call.args]
        whole = all(part is None or shape_of(part[0]) == shape_of(source) for part in made)
        return any(part is not None for part in made) and whole and len(call.args) <= MAX_SOURCES

    def _columns(self, weight: Any, form: str) -> np.ndarray | None:
        """Of each column of stored weights their scale, or the sum of their integers; None where no data is here."""
        packing = self.quantised.packings[weight.name]
        dtype = Dtype.F16 if form == "vectors" and packing.bits == 16 else Dtype.F32
        made = self.columns(replace(packing, form=form, group=packing.k), dtype) if packing.form != "panels" else None
        return None if made is None else made[0].astype(np.float64)

    def _zero_point(self, operands: Mapping[str, Any]) -> np.ndarray | None:
        """What the zero point of the activations adds to each column, over their scale; None where data is lacking."""
        zero = self._number(operands["a_zero"])
        sums, scales = self._columns(operands["w"], "sums"), self._columns(operands["w_scale"], "vectors")
        return None if zero is None or sums is None or scales is None else zero * sums * scales

    # The new module.

    def run(self) -> tuple[Quantised, Canonical]:
        """Rebuilds it."""
        parameters = list(self.quantised.module["main"].params)
        scaled = {variable: self._scaled(variable) for variable in self.grids if self._is_product(variable)}
        for variable in self.values:
            self._added(self.values[variable])  # parameters are declared before the function
        env = {parameter: parameter for parameter in parameters}

        def visit(state: Rebuild, variable: Any, call: Any, args: list[Any]) -> Any:
            if variable in self.absorbed:
                return args[0]
            if variable in self.sums:
                return self._sum(state, variable)
            if variable in scaled:
                return self._product(state, variable, scaled[variable])
            if (added := self._added(call)) is not None:
                attributes = {**dialect.plain_attributes(call), "residual_scaled": 1}
                return state.emit(dialect.call(call.op.name, [*args, added], **attributes))
            if variable in self.grids:
                attributes = {**dialect.plain_attributes(call), "out": "int8"}
                return state.emit(dialect.call("npu.pool", [self._read(state, call.args[0])], **attributes))
            return state.emit(Call(call.op, args, call.attrs))

        module, names = rebuild(self.quantised.module, [*parameters, *self.parameters.values()], env, visit)
        nodes = dict(self.canonical.nodes)
        old = self.quantised.names
        for variable, moved_in in self.joined.items():
            parts = [nodes.get(old.get(name, name), ()) for name in (variable, *moved_in)]
            nodes[old.get(variable, variable)] = tuple(dict.fromkeys(node for part in parts for node in part))
        canonical = replace(self.canonical, nodes=nodes, constants={**self.canonical.constants, **self.constants})
        packings = {**self.quantised.packings, **self.packings}
        made = self._without_unread(without_dead(module))
        return replace(self.quantised.rebuilt(made, names), packings=packings), canonical

    def _without_unread(self, module: Any) -> Any:
        """The module without the parameters that were read and are no more."""
        function = module["main"]
        read = {part for block in function.body.blocks for b in block.bindings for part in reads(b.value)}
        kept = [p for p in function.params if p in read or (p not in self.readers and p.name not in self.parameters)]
        made = relax.Function(kept, function.body, function.ret_ty, function.is_pure, function.attrs)
        return IRModule({"main": made})

    def _added(self, call: Any) -> Any | None:
        """The scale of a residual that becomes integers, which a product that stays a float reads."""
        last = call.args[-1] if operator_name(call) in PRODUCTS and int(call.attrs["residual"]) else None
        return self._constant(np.full((1, 1), self.grids[last].scale), "scale") if last in self.grids else None

    def _is_product(self, variable: Any) -> bool:
        return operator_name(self.values[variable]) in PRODUCTS

    def _read(self, state: Rebuild, value: Any) -> Any:
        """The integers that a value is made of, or that it became; the value itself where it is a float."""
        integers = self._integers(value)
        return state.env[value if integers is None else integers[0]]

    def _scaled(self, variable: Any) -> dict[str, Any]:
        """New parameters of a product, in units of its result's scale: `a_scale`, `bias`, `r_scale`."""
        call, grid = self.values[variable], self.grids[variable]
        operands = dict(zip(self._names(call), call.args, strict=True))
        scale = self._number(operands["a_scale"])
        assert scale is not None
        made = {"a_scale": self._constant(np.full((1, 1), scale / grid.scale), "scale")}
        residual = self._integers(operands["residual"]) if "residual" in operands else None
        of = residual[1] if residual is not None else Grid(1.0, 0.0)
        if "residual" in operands:
            made["r_scale"] = self._constant(np.full((1, 1), of.scale / grid.scale), "scale")
        if "bias" in operands and operands["bias"].name not in self.canonical.constants:
            made["bias"] = self._scaled_weight(operands["bias"], 1.0 / grid.scale)
        elif "bias" in operands or self._shifts(operands, grid):
            bias = np.zeros(int(call.attrs["n"]))
            if "bias" in operands:
                bias = self.canonical.constants[operands["bias"].name].reshape(-1) / grid.scale
            if "a_zero" in operands:
                zero = self._zero_point(operands)
                assert zero is not None
                bias = bias - zero * scale / grid.scale
            made["bias"] = self._constant(bias + grid.zero - of.zero * of.scale / grid.scale, "bias")
        return made

    def _constant(self, array: np.ndarray, hint: str) -> Any:
        """A parameter that holds numbers, as fp32; equal ones share it."""
        array = np.ascontiguousarray(array, np.float32)
        for name, held in self.constants.items():
            if held.shape == array.shape and np.array_equal(held, array):
                return self.parameters[name]
        name = f"requantised.{hint}{len(self.constants)}"
        self.constants[name] = array
        return self._parameter(name, array.shape)

    def _parameter(self, name: str, shape: tuple[int, ...]) -> Any:
        if name not in self.parameters:
            self.parameters[name] = relax.Var(name, relax.TensorType(list(shape), "float32"))
        return self.parameters[name]

    def _scaled_weight(self, weight: Any, factor: float) -> Any:
        """A vector of the student's, times a number, made when the weights are packed."""
        name = f"{weight.name}.times{factor!r}"
        source = self.weights[weight.name]
        self.packings[name] = Packing(source, "plain", 0, 0, 0, 32, 0, False, f"times:{factor!r}")
        return self._parameter(name, shape_of(weight))

    def _product(self, state: Rebuild, variable: Any, scaled: Mapping[str, Any]) -> Any:
        """The product with an integer result."""
        call = self.values[variable]
        operands = dict(zip(self._names(call), call.args, strict=True))
        read = {name: self._read(state, part) for name, part in operands.items()} | dict(scaled)
        attrs = dialect.plain_attributes(call)
        attrs.update(out="int8", requantised=1, asymmetric=0, bias=int("bias" in read))
        attrs["residual_scaled"] = attrs["residual"]
        act = moved(str(attrs.pop("act")), self.grids[variable]) if attrs.get("act") else "s0"
        if act != "s0":
            attrs["act"] = act
        wanted = ("a", "w", "a_scale", "w_scale", "bias", "residual", "r_scale")
        return state.emit(dialect.call(call.op.name, [read[name] for name in wanted if name in read], **attrs))

    def _sum(self, state: Rebuild, variable: Any) -> Any:
        """The elementwise operator on integers, rounded to integers; what saturates needs no bounds."""
        source, grid = self.values[self.sums[variable]], self._quantises(variable)
        assert grid is not None
        expr = ("add", "s0", "s1") if operator_name(source) == "npu.add" else parsed(str(source.attrs["expr"]))
        values: dict[str, Expr] = {}
        for index, part in enumerate(source.args):
            made = self._dequantises(part)
            values[f"s{index}"] = f"s{index}" if made is None else _value(f"s{index}", made[1])
        rounded: Expr = ("round", ("mul", substituted(expr, values), 1.0 / grid.scale))
        text = str(VectorKernel(("add", rounded, grid.zero) if grid.zero else rounded))
        rows, width = shape_of(source)
        args = [self._read(state, part) for part in source.args]
        return state.emit(dialect.call("npu.map", args, expr=text, rows=rows, width=width, out="int8"))


def _value(leaf: str, grid: Grid) -> Expr:
    """What an integer stands for."""
    return ("mul", ("sub", leaf, grid.zero) if grid.zero else leaf, grid.scale)


def parsed(text: str) -> Expr:
    """The expression of a microprogram."""
    return VectorKernel.parse(text).expr


def substituted(expr: Expr, values: Mapping[str, Expr]) -> Expr:
    """An expression with others in the place of its leaves."""
    if isinstance(expr, tuple):
        return (expr[0], *(substituted(part, values) for part in expr[1:]))
    return values.get(expr, expr) if isinstance(expr, str) else expr


def moved(text: str, grid: Grid) -> str:
    """A function of values as one of their integers, before these are rounded; `s0` where saturation does the same."""
    expr = parsed(text)
    bounds: list[tuple[str, float]] = []
    inner: Expr = expr
    while isinstance(inner, tuple) and inner[0] in ("max", "min") and isinstance(inner[2], float):
        bounds.append((str(inner[0]), inner[2] / grid.scale + grid.zero))
        inner = inner[1]
    if inner != "s0":
        whole = substituted(expr, {"s0": ("mul", ("sub", "s0", grid.zero), grid.scale)})
        return str(VectorKernel(("add", ("mul", whole, 1.0 / grid.scale), grid.zero)))
    for name, bound in reversed(bounds):
        if not (bound <= LOW if name == "max" else bound >= HIGH):
            inner = (name, inner, bound)
    return str(VectorKernel(inner))
