"""The share of the scratchpad that kernels get is chosen by what whole programs cost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from firsttoken import RunOptions
from firsttoken.subject import ImageNetwork
from firsttoken.validation.chips_nvdla import nvdla_variant
from firsttoken_compiler.codegen.norm_ways import Costs
from firsttoken_compiler.codegen.share_choice import SHARES, place_by_cost
from firsttoken_compiler.passes.place import Place
from firsttoken_compiler.pipeline import compile_onnx
from firsttoken_models.image_networks import RESNET_50
from firsttoken_models.registry import PROVIDER

NET = ImageNetwork(PROVIDER, replace(RESNET_50, side=64))


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    """The network on a small buffer, in integers and in floats."""
    found: dict[str, Any] = {}
    target = nvdla_variant(64, 64 << 10, 1e9)
    for format_ in ("int8", "fp16"):
        def observe(made: Any, _templates: Any, name: str = format_) -> None:
            found[name] = made

        ranges = NET.declared() if format_ == "int8" else ()
        precision = RunOptions(weights=format_, acts=format_, group="channel", ranges=ranges).precision()
        compile_onnx(NET.open(1, 0), target, precision, observe=observe)
    return {**found, "target": target}


def test_the_cheapest_share_is_taken(compiled: dict[str, Any]) -> None:
    launches, target = compiled["int8"].launches, compiled["target"]
    plans = {share: Place(target, share=share).run(launches) for share in SHARES}
    cycles = {share: Costs(target, plan).whole(launches).cycles for share, plan in plans.items()}
    taken = place_by_cost(Place(target), launches)
    best = min(cycles, key=lambda share: cycles[share])
    assert taken == plans[best]
    assert cycles[best] < cycles[SHARES[0]]  # here the usual share is not the cheapest
    assert taken.resident_bytes < plans[SHARES[0]].resident_bytes


def test_floats_and_several_cores_keep_the_usual_share(compiled: dict[str, Any]) -> None:
    target = compiled["target"]
    usual = Place(target).run(compiled["fp16"].launches)
    assert place_by_cost(Place(target), compiled["fp16"].launches) == usual
    two = Place(target, cores=2)
    assert place_by_cost(two, compiled["int8"].launches) == two.run(compiled["int8"].launches)
    assert replace(two, share=SHARES[-1]).run(compiled["int8"].launches) != two.run(compiled["int8"].launches)
