"""What `firsttoken schedule show` says about an operator: its kernel, its schedule, what that costs, and why."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Any, Final

from firsttoken.operator_names import matching

if TYPE_CHECKING:
    from firsttoken.scheduled import Graph
    from firsttoken_compiler.codegen.kernels import Kernel
    from firsttoken_compiler.schedule.choice import Choice
    from firsttoken_compiler.target.target import Target
    from firsttoken_simulator.report.document import OpRow

ALTERNATIVES: Final = 5


def shown(graph: Graph, target: Target, op: str, given: bool, rows: dict[str, OpRow]) -> list[dict[str, Any]]:
    """A document per kernel that computes an operator; on several cores one operator has a kernel per kind of part.

    `given`: whether the schedule is from a file. `rows`: the operators of a run of the graph, by their names.
    Raises OptionError where no operator has the name.
    """
    names = matching(op, [each.name for each in graph.program.ops])
    numbers = [number for number, each in enumerate(graph.program.ops) if each.name in names]
    found = []
    for kernel, choice in zip(graph.kernels, graph.choices, strict=True):
        mine = [number for number in numbers if number in kernel.launches]
        if mine:
            found.append(_document(graph, kernel, choice, mine, target, given, rows))
    return found


def _document(
    graph: Graph, kernel: Kernel, choice: Choice | None, mine: list[int], target: Target, given: bool,
    rows: dict[str, OpRow],
) -> dict[str, Any]:  # fmt: skip
    from firsttoken.schedule_file import patterns
    from firsttoken_compiler.codegen.build import build
    from firsttoken_compiler.schedule.choice import facts_of, product_dims

    names = [graph.program.ops[number].name for number in mine]
    everything = [op.name for op in graph.program.ops]
    template = build(kernel.spec, kernel.spaces, kernel.target, kernel.room, choice)
    dims = product_dims(kernel.spec)
    cycles = [rows[name].cycles for name in names if name in rows]
    spans = [rows[name].end_cycle - rows[name].start_cycle for name in names if name in rows]
    document: dict[str, Any] = {
        "operators": names, "graph": graph.phase, "key": kernel.key, "kind": kernel.spec.kind,
        "covers": list(patterns(graph.operators(kernel), everything)), "launches": len(kernel.launches),
        "dims": list(dims) if dims is not None else list(kernel.spec.outs[0].shape),
        "operands": _operands(kernel), "choice": None if choice is None else facts_of(choice),
        "text": "" if choice is None else choice.text(), "instructions": len(template.code),
        "scratchpad_bytes": template.scratch_bytes, "accumulator_bytes": template.acc_bytes,
        "free_scratchpad_bytes": kernel.room.limit, "preferred_scratchpad_bytes": kernel.room.preferred,
        "accumulators_of_target": target.scratchpad.accumulator_bytes,
        "simulated_cycles": round(sum(cycles) / len(cycles)) if cycles else None,
        "simulated_span": round(sum(spans) / len(spans)) if spans else None,
        "roofline_cycles": rows[names[0]].roofline_cycles if names[0] in rows else None,
        "dataflow": _dataflow(target),
    }  # fmt: skip
    return document | (_reasons(kernel, choice, given) if choice is not None else {"why": "nothing to choose"})


def _operands(kernel: Kernel) -> list[dict[str, Any]]:
    from firsttoken_compiler.schedule.rowwise import kernel_operands

    args = kernel_operands(kernel.spec, (*kernel.spec.args, *kernel.spec.outs))
    names = operand_titles(kernel, len(args))
    return [
        {"name": name, "shape": list(arg.shape), "type": arg.dtype.text, "lies_in": space.text}
        for name, arg, space in zip(names, args, kernel.spaces, strict=True)
    ]


def operand_titles(kernel: Kernel, count: int) -> list[str]:
    """Names of a kernel's operands and results."""
    from firsttoken_compiler.schedule import attention, linear

    if kernel.spec.kind == "linear":
        return linear.operand_names(kernel.spec)
    if kernel.spec.kind == "attention":
        return [*attention.operand_names(kernel.spec), "out"]
    results = len(kernel.spec.outs)
    inputs = [f"in{index}" for index in range(count - results)]
    return [*inputs, *(["out"] if results == 1 else [f"out{index}" for index in range(results)])]


def _dataflow(target: Target) -> str:
    """What the matrix unit holds; no instruction chooses it."""
    names = {"ws": "weight-stationary", "os": "output-stationary", "is": "input-stationary"}
    return names[target.matrix.dataflow] if target.matrix.kind == "systolic" else "weight tiles"


def _reasons(kernel: Kernel, choice: Choice, given: bool) -> dict[str, Any]:
    """Estimates, where the kernel has an account of them, of this choice, the compiler's own and the best of all."""
    from firsttoken_compiler.schedule.choice import facts_of
    from firsttoken_compiler.schedule.choosing import default_choice, legal_costs, needs, ranked

    spec, spaces, target = kernel.spec, kernel.spaces, kernel.target
    own = default_choice(spec, spaces, target, kernel.room)
    mine = ranked(spec, spaces, target, choice)
    every = list(legal_costs(spec, spaces, target, kernel.room))
    others = [(cost, index) for index, (each, cost) in enumerate(every) if cost is not None and each != choice]
    best = heapq.nsmallest(ALTERNATIVES, others)

    def row(each: Choice, cost: float | None) -> dict[str, Any]:
        scratch, _ = needs(spec, spaces, target, each)
        return {
            "text": each.text(), "choice": facts_of(each), "estimated_cycles": None if cost is None else round(cost),
            "scratchpad_bytes": scratch, "preferred": scratch <= kernel.room.preferred,
        }  # fmt: skip

    why = "given by the schedule file"
    if not given or choice == own:
        why = (
            "the compiler's own: the largest block of rows that fits the preferred scratchpad" if mine is None else
            "the compiler's own: of its tiles that fit the preferred scratchpad, the one of least estimated cycles"
        )  # fmt: skip
    return {
        "why": why, "estimated_cycles": None if mine is None else round(mine), "legal_choices": len(every),
        "own_choice": None if own is None or own == choice else row(own, ranked(spec, spaces, target, own)),
        "alternatives": [row(every[index][0], cost) for cost, index in best],
    }  # fmt: skip


def loops(kernel: Kernel, choice: Choice) -> list[str]:
    """The loops of a kernel's scheduled functions; of an attention with online softmax, those that it becomes."""
    from firsttoken_compiler.codegen import online_attention
    from firsttoken_compiler.codegen.loop_text import lines_of
    from firsttoken_compiler.codegen.tir_reader import read
    from firsttoken_compiler.schedule.choice import AttentionChoice
    from firsttoken_compiler.schedule.choosing import attention_tile
    from firsttoken_compiler.schedule.kernel import lowered
    from firsttoken_compiler.schedule.traces import traces

    if isinstance(choice, AttentionChoice) and choice.softmax == "online":
        tile = attention_tile(choice, kernel.spec, kernel.target)
        body, params = online_attention.statements(kernel.spec, kernel.spaces, tile, kernel.target)
        return lines_of(body, params, operand_titles(kernel, len(params)), list(kernel.spaces))
    lines = []
    for part in traces(kernel.spec, kernel.spaces, kernel.target, choice):
        body, params = read(lowered(part.module), outer=1 if part.name == "rows" else 0)
        names = [str(parameter.name) for parameter in part.source["main"].params]
        lines += lines_of(body, params, [*names, *["out"] * (len(params) - len(names))], list(part.spaces))
    return lines
