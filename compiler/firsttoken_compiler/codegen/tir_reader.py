"""Lowered TIR → plain loops: every chain of loops around one store becomes a nest, every intrinsic call a statement.

Loop annotations made by the schedules: `npu.axis` (the kernel's axis and step, `m:64`) on sequential and inner loops,
`software_pipeline_stage` on pipelined loops, `npu.slots` (`w=3,a=3`) on loops that fetch tiles of these operands.
A loop is sequential when it is annotated with a step.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from firsttoken_compiler.codegen.loops import (
    Access,
    Alloc,
    Buffer,
    GatherNest,
    Loop,
    MatmulCall,
    Nest,
    Offset,
    Statement,
    Value,
)
from firsttoken_compiler.errors import ProgramError
from firsttoken_compiler.isa.types import Dtype
from firsttoken_compiler.schedule.spec import DTYPES

_BINARY = {
    "Add": "add", "Sub": "sub", "Mul": "mul", "Div": "div", "Max": "max", "Min": "min", "LT": "lt", "LE": "le",
    "EQ": "eq", "And": "and", "Or": "or",
}  # fmt: skip
_CALLS = {
    "tirx.exp": "exp", "tirx.sigmoid": "sigmoid", "tirx.rsqrt": "rsqrt", "tirx.sqrt": "sqrt", "tirx.fabs": "abs",
    "tirx.round": "round", "tirx.nearbyint": "round", "tirx.tanh": "tanh", "tirx.floor": "floor", "tirx.ceil": "ceil",
    "prim.ceil": "ceil", "tirx.log": "log", "tirx.erf": "erf", "tirx.trunc": "i32", "tirx.sin": "sin",
    "tirx.cos": "cos", "tirx.pow": "pow",
    "tirx.if_then_else": "select", "prim.if_then_else": "select",
}  # fmt: skip
_SWAPPED = {"GT": "lt", "GE": "le"}
_MAX_LOCAL_LOOPS = 3


def read(function: Any, outer: int = 0) -> tuple[list[Statement], list[Buffer]]:
    """Statements and operand buffers (in parameter order) of a lowered PrimFunc, to stand inside `outer` more loops.

    Raises ProgramError for a statement or an index that no instruction can express.
    """
    return _Reader(function, outer).run()


class _Reader:
    """One function: names of buffers, the stack of sequential loops, the loops of the present nest."""

    def __init__(self, function: Any, outer: int) -> None:
        self.function = function
        self.buffers: dict[Any, Buffer] = {}
        self.alias: dict[Any, Any] = {}
        self.sequential: list[Any] = [None] * outer
        self.params: list[Buffer] = []
        self.slots: dict[str, int] = {}

    def run(self) -> tuple[list[Statement], list[Buffer]]:
        for index, parameter in enumerate(self.function.params):
            shape = [int(extent) for extent in parameter.shape]
            elements = 1
            for extent in shape:
                elements *= extent
            buffer = Buffer(f"p{index}", "param", _dtype(parameter), elements, index)
            self.buffers[parameter] = buffer
            self.params.append(buffer)
        return self.statements(self.function.body), self.params

    def statements(self, node: Any) -> list[Statement]:
        """Statements of a node, in order."""
        kind = type(node).__name__
        if kind == "SeqStmt":
            return [statement for child in node.seq for statement in self.statements(child)]
        if kind == "AllocBuffer":
            made = self._local(node.buffer)
            return [Alloc(made, self.slots.get(made.name.rpartition("_global")[0], 0))]
        if kind == "DeclBuffer":
            self.alias[node.buffer] = self._source(node.data)
            return []
        if kind == "For":
            return self._for(node)
        if kind == "BufferStore":
            return self._leaf([], node)
        if kind == "Evaluate":
            return self._intrinsic(node.value)
        if kind in ("AttrStmt", "SBlockRealize", "SBlock"):
            return self.statements(node.block.body if kind == "SBlockRealize" else node.body)
        raise ProgramError(f"internal: no instruction for TIR statement {kind}")

    def _local(self, buffer: Any) -> Buffer:
        scope = str(buffer.scope())
        elements = 1
        for extent in buffer.shape:
            elements *= int(extent)
        space = "acc" if scope.endswith("acc") else "spad"
        self.buffers[buffer] = Buffer(str(buffer.name), space, _dtype(buffer), elements)
        return self.buffers[buffer]

    def _source(self, data: Any) -> Any:
        while type(data).__name__ == "Call":
            data = data.args[0]
        return data

    def _buffer(self, handle: Any) -> Buffer:
        handle = self._source(handle)
        while handle in self.alias and handle not in self.buffers:
            handle = self.alias[handle]
        if handle not in self.buffers:
            raise ProgramError(f"internal: TIR names an unknown buffer {handle}")
        return self.buffers[handle]

    def _for(self, node: Any) -> list[Statement]:
        if int(node.min) != 0:
            raise ProgramError("internal: a loop that does not start at 0")
        axis, step = _axis(node)
        self.slots |= _slots(node)
        stages = node.annotations.get("software_pipeline_stage", None)
        if not step and stages is None:
            chain, body = [node], node.body
            while type(body).__name__ == "For" and not _axis(body)[1]:
                chain.append(body)
                body = body.body
            if type(body).__name__ == "BufferStore":
                return self._leaf(chain, body)
        loop = Loop(
            len(self.sequential), int(node.extent), axis, step,
            () if stages is None else tuple(int(stage) for stage in stages),
        )  # fmt: skip
        self.sequential.append(node.loop_var)
        loop.body = self.statements(node.body)
        self.sequential.pop()
        return [loop]

    def _leaf(self, chain: list[Any], store: Any) -> list[Statement]:
        """A nest; loops beyond an instruction's three axes stay sequential."""
        spare = len([loop for loop in chain if int(loop.extent) > 1]) - _MAX_LOCAL_LOOPS
        if spare <= 0:
            indirect = self._gather(chain, store)
            return [indirect if indirect is not None else self._nest(chain, store)]
        outer = chain[0]
        loop = Loop(len(self.sequential), int(outer.extent), "", 0, ())
        self.sequential.append(outer.loop_var)
        loop.body = self._leaf(chain[1:], store)
        self.sequential.pop()
        return [loop]

    def _nest(self, chain: list[Any], store: Any) -> Nest:
        variables = [loop.loop_var for loop in chain]
        return Nest(
            tuple(int(loop.extent) for loop in chain),
            tuple(_axis(loop)[0] for loop in chain),
            self._access(store.buffer, store.indices[0], variables),
            self._value(store.value, variables),
        )

    def _gather(self, chain: list[Any], store: Any) -> GatherNest | None:
        """Loops of one iteration may be missing: the one over rows is named, the other runs over columns."""
        load = store.value
        if type(load).__name__ != "TensorLoad" or not _contains_load(load.indices[0]):
            return None
        row, column = ([loop for loop in chain if bool(_axis(loop)[0]) is named] for named in (True, False))
        if len(row) > 1 or len(column) > 1:
            raise ProgramError("internal: a gather over more than rows and columns")
        rows, width = (int(loops[0].extent) if loops else 1 for loops in (row, column))
        variables = [loop.loop_var for loop in (*row, *column)]
        indirect = _find_load(load.indices[0])
        dst = self._access(store.buffer, store.indices[0], variables)
        indices = self._access(indirect.source, indirect.indices[0], variables)
        dst, indices = (replace(a, coefficients=a.coefficients[:1] if row else (0,)) for a in (dst, indices))
        table = self._buffer(load.source)
        return GatherNest(rows, width, _axis(row[0])[0] if row else "", dst, indices, table, table.elements // width)

    def _access(self, buffer: Any, index: Any, variables: list[Any]) -> Access:
        base, coefficients = self._affine(index, variables)
        return Access(self._buffer(buffer), base, tuple(coefficients))

    def _pointer(self, call: Any) -> Access:
        """The first element of a `tvm_access_ptr`."""
        return Access(self._buffer(call.args[1]), self._affine(call.args[2], [])[0], ())

    def _intrinsic(self, call: Any) -> list[Statement]:
        if type(call).__name__ != "Call" or call.op.name != "tirx.call_extern":
            return []
        name, *arguments = call.args
        words = str(name.value).split(":")
        numbers = [int(argument) for argument in arguments if type(argument).__name__ == "IntImm"]
        pointers = [self._pointer(argument) for argument in arguments if type(argument).__name__ == "Call"]
        if words[0] == "npu.copy":
            rank = len(numbers) // 3
            extents, to, source = (numbers[i * rank : (i + 1) * rank] for i in range(3))
            dst = Access(pointers[0].buffer, pointers[0].base, tuple(to))
            load = Access(pointers[1].buffer, pointers[1].base, tuple(source))
            return [Nest(tuple(extents), tuple(words[1].split(",")), dst, ("load", load))]
        if words[0] == "npu.matmul":
            m, n, k, panel, acc, a, panel_stride, row_stride = numbers
            first, second, third = words[1].split(",")
            sums, left, right = pointers
            axes = first, second, third
            return [MatmulCall(m, n, k, axes, sums, left, right, acc, a, panel_stride, row_stride, panel)]
        raise ProgramError(f"internal: unknown intrinsic {name}")

    def _value(self, node: Any, variables: list[Any]) -> Value:
        kind = type(node).__name__
        if kind == "TensorLoad":
            return ("load", self._access(node.source, node.indices[0], variables))
        if kind in ("IntImm", "FloatImm"):
            return ("const", float(node.value))
        if kind == "Cast":
            return self._value(node.value, variables)
        if kind in _BINARY:
            if _is_index(node):
                base, coefficients = self._affine(node, variables)
                return ("index", base, tuple(coefficients))
            return (_BINARY[kind], self._value(node.a, variables), self._value(node.b, variables))
        if kind == "NE":
            return ("eq", ("eq", self._value(node.a, variables), self._value(node.b, variables)), ("const", 0.0))
        if kind in _SWAPPED:
            return (_SWAPPED[kind], self._value(node.b, variables), self._value(node.a, variables))
        if kind == "Var":
            base, coefficients = self._affine(node, variables)
            return ("index", base, tuple(coefficients))
        if kind == "Select":
            return (
                "select",
                *(self._value(part, variables) for part in (node.condition, node.true_value, node.false_value)),
            )
        if kind == "Call" and node.op.name in _CALLS:
            return (_CALLS[node.op.name], *(self._value(argument, variables) for argument in node.args))
        raise ProgramError(f"internal: the vector unit has no operation for TIR {kind} {node}")

    def _affine(self, node: Any, variables: list[Any]) -> tuple[Offset, list[int]]:
        """(part that the sequential loops decide, coefficient of each variable)."""
        kind = type(node).__name__
        if isinstance(node, int) or kind == "IntImm":
            value = int(node)
            return (lambda _env: value), [0] * len(variables)
        if kind == "Var":
            for index, variable in enumerate(variables):
                if node.same_as(variable):
                    return (lambda _env: 0), [int(i == index) for i in range(len(variables))]
            for depth, variable in enumerate(self.sequential):
                if variable is not None and node.same_as(variable):
                    return (lambda env, depth=depth: env[depth]), [0] * len(variables)
            raise ProgramError(f"internal: TIR index uses the unknown variable {node}")
        if kind == "Cast":
            return self._affine(node.value, variables)
        if kind in ("Add", "Sub", "Mul", "FloorDiv", "FloorMod", "Max", "Min"):
            return _combine(kind, self._affine(node.a, variables), self._affine(node.b, variables), node)
        raise ProgramError(f"internal: TIR index {node} is not affine")


def _combine(
    kind: str, left: tuple[Offset, list[int]], right: tuple[Offset, list[int]], node: Any
) -> tuple[Offset, list[int]]:
    (a, p), (b, q) = left, right
    if kind == "Add":
        return (lambda env: a(env) + b(env)), [x + y for x, y in zip(p, q, strict=True)]
    if kind == "Sub":
        return (lambda env: a(env) - b(env)), [x - y for x, y in zip(p, q, strict=True)]
    if kind == "Mul":
        if any(p) and any(q):
            raise ProgramError(f"internal: TIR index {node} is not affine")
        if any(p) or any(q):
            coefficients, factor = (p, b) if any(p) else (q, a)
            scale = factor([])  # a loop-dependent factor of an inner loop would raise here: the environment is empty
            return (lambda env: a(env) * b(env)), [x * scale for x in coefficients]
        return (lambda env: a(env) * b(env)), p
    if any(p) or any(q):
        raise ProgramError(f"internal: TIR index {node} is not affine in the axes of an instruction")
    if kind == "FloorDiv":
        return (lambda env: a(env) // b(env)), p
    if kind == "FloorMod":
        return (lambda env: a(env) % b(env)), p
    return ((lambda env: max(a(env), b(env))) if kind == "Max" else (lambda env: min(a(env), b(env)))), p


def _slots(node: Any) -> dict[str, int]:
    """Slots that a loop demands for tiles of operands."""
    text = str(node.annotations.get("npu.slots", ""))
    return {name: int(count) for name, _, count in (part.partition("=") for part in text.split(",") if part)}


def _axis(loop: Any) -> tuple[str, int]:
    text = loop.annotations.get("npu.axis", None)
    if text is None:
        return "", 0
    name, _, step = str(text).partition(":")
    return name, int(step or 0)


def _is_index(node: Any) -> bool:
    """Whether an expression is arithmetic on loop variables only."""
    kind = type(node).__name__
    if kind in ("Var", "IntImm"):
        return True
    return kind in ("Add", "Sub", "Mul") and _is_index(node.a) and _is_index(node.b)


def _contains_load(node: Any) -> bool:
    return _find_load(node) is not None


def _find_load(node: Any) -> Any:
    kind = type(node).__name__
    if kind == "TensorLoad":
        return node
    for part in ("a", "b", "value"):
        found = _find_load(getattr(node, part)) if kind not in ("Var", "IntImm") and hasattr(node, part) else None
        if found is not None:
            return found
    return None


def _dtype(buffer: Any) -> Dtype:
    return DTYPES[str(buffer.dtype)]
