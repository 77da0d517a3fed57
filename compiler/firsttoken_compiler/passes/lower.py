"""Typed npu calls → one PrimFunc per distinct spec, fused by TVM → a list of kernel launches.

LegalizeOps gives each call its PrimFunc, FuseOps/FuseTIR merge what is elementwise. Every value has a storage of its
own, from the launch that writes it to the last one that reads it; `place` lets storages share memory.
"""

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from firsttoken_compiler.errors import StudentError
from firsttoken_compiler.passes.quantise import Quantised
from firsttoken_compiler.schedule.definitions import definition
from firsttoken_compiler.schedule.spec import DTYPES, Arg, KernelSpec
from firsttoken_compiler.tvm import dialect
from firsttoken_compiler.tvm.api import Call, GlobalVar, items, relax, shape_of, transform, tvm

OPAQUE = 8
"""TVM's pattern kind of functions that FuseOps leaves alone."""


@dataclass(frozen=True)
class Storage:
    """The memory of one value, live from launch `first` to launch `last`, both included."""

    name: str
    nbytes: int
    first: int
    last: int


@dataclass(frozen=True)
class Value:
    """Where an operand lives: a parameter by name, a storage, or a graph output."""

    kind: str
    """`param`, `storage` or `output`."""
    name: str
    arg: Arg
    at: int = 0
    """Bytes from the beginning of the value: columns of a wider matrix."""


@dataclass(frozen=True)
class Launch:
    """One kernel with its operands and results."""

    spec: KernelSpec
    args: tuple[Value, ...]
    outs: tuple[Value, ...]
    label: str
    """Canonical variable that the launch computes."""
    title: str = ""
    """What people know it by where that is not the name of the label's nodes."""


@dataclass(frozen=True)
class Launches:
    """The lowered graph. `outputs` are the values that the graph returns, in order."""

    launches: tuple[Launch, ...]
    storages: tuple[Storage, ...]
    outputs: tuple[Value, ...]
    params: dict[str, Arg]
    module: Any
    reshaped: frozenset[str] = frozenset()
    """Storages whose values are also seen as matrices of other rows, so that rows may lie nowhere but densely."""


def _spec(call: Any) -> KernelSpec:
    fields = call.ty.fields if isinstance(call.ty, relax.TupleType) else [call.ty]
    params = tuple(sorted(dialect.plain_attributes(call).items()))
    args = tuple([_arg(a.ty) for a in items(call.args)])
    return KernelSpec(call.op.name.removeprefix("npu."), params, args, tuple(_arg(field) for field in fields))


def _arg(ty: Any) -> Arg:
    return Arg(tuple([int(extent) for extent in items(ty.shape.values)]), DTYPES[str(ty.dtype.dtype)])


@lru_cache(maxsize=1024)
def _prim_func(spec: KernelSpec) -> Any:
    return definition(spec).with_attr("npu.spec", spec.to_json()).with_attr("op_pattern", OPAQUE)


_added: ContextVar[dict[KernelSpec, Any]] = ContextVar("added")
"""What the module that is being legalised has: the builder would compare functions to find it."""


def _legalise(builder: Any, call: Any) -> Any:
    """FLegalize of every npu operator: a call of the spec's PrimFunc."""
    spec, added = _spec(call), _added.get()
    if spec not in added:
        added[spec] = builder.add_func(_prim_func(spec), spec.kind)
    name = added[spec]
    fields = call.ty.fields if isinstance(call.ty, relax.TupleType) else [call.ty]
    made = relax.call_tir(name, items(call.args), list(fields) if len(fields) > 1 else fields[0])
    alone = isinstance(call.ty, relax.TupleType) and len(fields) == 1
    return relax.Tuple([builder.emit(made)]) if alone else made


for _name in dialect.CANONICAL:
    tvm.ir.register_op_attr(_name, "FLegalize", _legalise)


@dataclass(frozen=True)
class Lower:
    """See the module's docstring."""

    def run(self, quantised: Quantised) -> Launches:
        """Runs TVM's passes and reads the launch list off the result."""
        stages = [
            transform.LegalizeOps(), transform.AnnotateTIROpPattern(), transform.FuseOps(), transform.FuseTIR(),
            transform.RewriteDataflowReshape(), transform.ToNonDataflow(), transform.RemovePurityChecking(),
            transform.CallTIRRewrite(),
        ]  # fmt: skip
        before = _added.set({})
        try:
            module = tvm.transform.Sequential(stages)(quantised.module)
        finally:
            _added.reset(before)
        return _Reader(module, quantised).read()


def _rows(shape: tuple[int, ...]) -> tuple[int, ...]:
    """What decides how rows lie in the scratchpad: the extents of a matrix of several rows, nothing for the rest."""
    return shape if len(shape) == 2 and shape[0] > 1 else ()


def storages_of(launches: Sequence[Launch]) -> tuple[Storage, ...]:
    """The storages of all values that are no parameters and no results, in the order in which they are first used."""
    found: dict[str, Storage] = {}
    for number, launch in enumerate(launches):
        for value in (*launch.args, *launch.outs):
            if value.kind == "storage":
                before = found.get(value.name, Storage(value.name, 0, number, number))
                found[value.name] = replace(before, nbytes=max(before.nbytes, value.arg.nbytes), last=number)
    return tuple(found.values())


class _Reader:
    """Walks the main function: allocations, launches, views, results."""

    def __init__(self, module: Any, quantised: Quantised) -> None:
        self.module, self.names = module, quantised.names
        self.values: dict[Any, Any] = {}
        self.raw: list[tuple[KernelSpec, list[Any]]] = []
        self.specs: dict[str, KernelSpec] = {}
        """By function."""
        self.labels: dict[int, str] = {}
        self.reshaped: set[str] = set()
        self.made = 0

    def read(self) -> Launches:
        function = self.module["main"]
        params = {p.name: _arg(p.ty) for p in function.params}
        for parameter in function.params:
            self.values[parameter] = Value("param", parameter.name, params[parameter.name])
        for block in items(function.body.blocks):
            for binding in items(block.bindings):
                self._binding(binding.var, binding.value)
        body = self.values[function.body.body]
        returned = tuple(body if isinstance(body, tuple) else (body,))
        results = {value.name for value in returned if value.kind == "storage"}

        def final(value: Value) -> Value:
            return replace(value, kind="output") if value.kind == "storage" and value.name in results else value

        launches = []
        for number, (spec, values) in enumerate(self.raw):
            operands = [final(value) for value in values]
            arity = len(spec.args)
            label = self.labels.get(number, "")
            launches.append(Launch(spec, tuple(operands[:arity]), tuple(operands[arity:]), label))
        outputs = tuple(final(value) for value in returned)
        return Launches(
            tuple(launches), storages_of(launches), outputs, params, self.module, frozenset(self.reshaped - results)
        )

    def _binding(self, variable: Any, value: Any) -> None:
        if isinstance(value, Call) and isinstance(value.op, GlobalVar):
            self._launch(value)
        elif isinstance(value, Call):
            self._intrinsic(variable, value)
        elif isinstance(value, relax.Tuple):
            self.values[variable] = tuple(self.values[field] for field in value.fields)
            self._label(variable)
        elif isinstance(value, relax.TupleGetItem):
            self.values[variable] = self.values[value.tuple_value][value.index]
        elif value in self.values:
            self.values[variable] = self.values[value]
            self._label(variable)

    def _launch(self, call: Any) -> None:
        name = str(call.op.name_hint)
        if name not in self.specs:
            function = self.module[call.op]
            text = function.attrs.get("npu.spec") if function.attrs else None
            if text is None:
                raise StudentError(f"internal: kernel {name} has no npu operator; it cannot be scheduled")
            self.specs[name] = KernelSpec.from_json(str(text))
        self.raw.append((self.specs[name], [self.values[argument] for argument in items(call.args)]))

    def _label(self, variable: Any) -> None:
        """A variable bound to what the last launch wrote names that launch."""
        if self.raw and variable.name in self.names:
            self.labels.setdefault(len(self.raw) - 1, self.names[variable.name])

    def _intrinsic(self, variable: Any, call: Any) -> None:
        name = call.op.name
        if name == "relax.builtin.alloc_tensor":
            self.values[variable] = Value("storage", f"storage{self.made}", _arg(call.ty))
            self.made += 1
        elif name in ("relax.reshape", "relax.memory.view"):
            source = self.values[call.args[0]]
            if source.kind == "storage" and _rows(source.arg.shape) != _rows(shape_of(call)):
                self.reshaped.add(source.name)
            self.values[variable] = Value(source.kind, source.name, Arg(shape_of(call), source.arg.dtype))
        else:
            raise StudentError(f"internal: unexpected {name} after lowering")
