"""firsttoken.tuning.measure: a kernel alone says what it costs in the whole program."""

from __future__ import annotations

import dataclasses

import pytest
from scipy.stats import spearmanr

from firsttoken.tuning.alone import LAUNCHES, alone
from firsttoken.tuning.measure import KernelTime, measure_kernel
from firsttoken.tuning.search import Kernel, candidates
from firsttoken.tuning.whole import Graph
from firsttoken_compiler.codegen.build import build
from firsttoken_compiler.codegen.verify import verify
from firsttoken_compiler.errors import AllocationError, OptionError
from firsttoken_compiler.isa.types import Space
from firsttoken_compiler.schedule.choice import Choice, ProductChoice
from firsttoken_compiler.schedule.tiling import Room


def product(graph: Graph, ending: str) -> Kernel:
    return next(kernel for kernel in graph.kernels if kernel.spec.kind == "linear" and kernel.name.endswith(ending))


def time(kernel: Kernel, choice: Choice | None = None) -> KernelTime:
    return measure_kernel(kernel.spec, kernel.spaces, kernel.machine, kernel.room, choice)


@pytest.mark.parametrize("name", ["up_proj", "down_proj"])
@pytest.mark.parametrize("phase", ["prompt", "token"])
def test_ranks_are_those_of_whole_programs(phase: str, name: str, request: pytest.FixtureRequest) -> None:
    graph: Graph = request.getfixturevalue(phase)
    kernel = product(graph, name)
    choices = candidates(kernel)
    tried = choices[:: max(1, len(choices) // 11)]
    alone_cycles = [time(kernel, choice).cycles for choice in tried]
    whole = [graph.cost({kernel.key: choice}).cycles for choice in tried]
    assert len(tried) > 8
    assert max(whole) > 1.1 * min(whole)
    assert spearmanr(alone_cycles, whole).statistic > 0.9
    best = min(range(len(tried)), key=lambda i: alone_cycles[i])
    assert whole[best] <= 1.01 * min(whole)


def test_a_slower_choice_costs_the_whole_as_much_as_alone(prompt: Graph) -> None:
    kernel = product(prompt, "up_proj")
    own, *others = candidates(kernel)
    slow = others[-1]
    alone_cost = kernel.launches * (time(kernel, slow).cycles - time(kernel, own).cycles)
    whole_cost = prompt.cost({kernel.key: slow}).cycles - prompt.cost({kernel.key: own}).cycles
    assert whole_cost == pytest.approx(alone_cost, rel=0.15)
    assert prompt.cost({kernel.key: own}) == prompt.cost({})


def test_weights_come_while_the_launch_before_computes(prompt: Graph) -> None:
    kernel = product(prompt, "up_proj")
    template = build(kernel.spec, kernel.spaces, kernel.machine, kernel.room)
    together = measure_kernel(kernel.spec, kernel.spaces, kernel.machine, kernel.room)
    full = Room(template.scratch_bytes, template.scratch_bytes)
    apart = measure_kernel(kernel.spec, kernel.spaces, kernel.machine, full)
    assert together.cycles < apart.cycles  # launches that work in the same bytes wait for each other
    assert together.dram_bytes == apart.dram_bytes > kernel.spec.args[1].nbytes


def test_every_kernel_of_a_student_makes_a_valid_program(prompt: Graph, token: Graph) -> None:
    for kernel in (*prompt.kernels, *token.kernels):
        template = build(kernel.spec, kernel.spaces, kernel.machine, kernel.room)
        program = alone(kernel.spec, kernel.spaces, template, kernel.machine, kernel.room)
        verify(program, kernel.machine)
        assert len(program.ops) == LAUNCHES + 1
        found = time(kernel)
        assert found.cycles > 0
        assert found.energy_mj > 0


def test_what_does_not_fit_is_refused_with_its_limit(prompt: Graph) -> None:
    kernel = product(prompt, "up_proj")
    template = build(kernel.spec, kernel.spaces, kernel.machine, kernel.room)
    little = Room(template.scratch_bytes // 2, template.scratch_bytes - 1)
    with pytest.raises(AllocationError, match=f"{template.scratch_bytes - 1} free"):
        alone(kernel.spec, kernel.spaces, template, kernel.machine, little)
    own = candidates(kernel)[0]
    assert isinstance(own, ProductChoice)
    with pytest.raises(OptionError, match="m is 49"):
        time(kernel, dataclasses.replace(own, m=49))
    assert Space.SPAD in kernel.spaces
