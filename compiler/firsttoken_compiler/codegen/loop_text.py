"""The loops of a scheduled kernel as lines of text, for people who judge a schedule."""

from __future__ import annotations

from firsttoken_compiler.codegen import slots
from firsttoken_compiler.codegen.loops import Alloc, Buffer, Computed, GatherNest, Loop, MatmulCall, Statement
from firsttoken_compiler.isa.types import Engine, Space

AXES = {"m": "rows", "p": "panels", "k": "k", "b": "heads", "r": "rows", "t": "keys"}
SKEWS = {-1: "one iteration ahead:", 1: "one iteration behind:"}
VERBS = {Engine.DMA_IN: "load", Engine.DMA_OUT: "store", Engine.VECTOR: "vector"}


def lines_of(body: list[Statement], params: list[Buffer], names: list[str], spaces: list[Space]) -> list[str]:
    """An indented line per loop and per instruction; `names` of the operands `params`, which lie in `spaces`."""
    titles = {param.name: name for param, name in zip(params, names, strict=True)}
    memory = slots.assign(body, spaces, 1)

    def title(buffer: Buffer) -> str:
        if buffer.param >= 0:
            return titles.get(buffer.name, buffer.name)
        return buffer.name.partition("_global")[0]

    def local(buffer: Buffer) -> str:
        room = memory.rooms.get(buffer)
        if room is None:
            return title(buffer)
        several = f"{room.depth} x " if room.depth > 1 else ""
        return f"{title(buffer)} ({several}{room.nbytes:,} bytes of {room.space.text})"

    out: list[str] = []

    def walk(statements: list[Statement], depth: int) -> None:
        indent = "  " * depth
        for statement in statements:
            if isinstance(statement, Loop):
                step = f" of {statement.step}" if statement.step else ""
                line = f"for {statement.extent} x {AXES.get(statement.axis, statement.axis)}{step}:"
                out.append(f"{indent}{SKEWS.get(statement.skew, line)}")
                walk(statement.body, depth + 1)
            elif isinstance(statement, MatmulCall):
                c = statement
                what = " x ".join(title(access.buffer) for access in (c.a, c.w))
                out.append(f"{indent}matmul {c.m}x{c.n}x{c.k}: {title(c.acc.buffer)} += {what}")
            elif isinstance(statement, GatherNest):
                out.append(f"{indent}gather {statement.rows} rows of {title(statement.table)}")
            elif not isinstance(statement, (Alloc, Computed)):
                engine = slots.engine_of(statement, spaces)
                if engine is not None:
                    shown = "x".join(str(extent) for extent in statement.extents)
                    read = ", ".join(dict.fromkeys(title(access.buffer) for access in slots.loads(statement.value)))
                    out.append(f"{indent}{VERBS[engine]} {shown}: {local(statement.dst.buffer)} <- {read}")

    walk(body, 0)
    return out
