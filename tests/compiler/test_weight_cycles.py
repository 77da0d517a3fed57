"""Weights that a unit of tiles turns into another type first cost that much per tile, whatever the rows."""

import pytest

from firsttoken_compiler.errors import TargetError
from firsttoken_compiler.target.load import parse_target
from firsttoken_compiler.target.rates import matmul_cost


def preset(name: str) -> str:
    from importlib import resources

    return (resources.files("firsttoken_compiler.target") / "presets" / f"{name}.toml").read_text("utf-8")


def given(text: str, pair: str, cycles: str) -> bytes:
    """The file with one value of `matrix.weight_cycles`, in place of those that it has, and nothing to fit."""
    text = text.partition("\n[[calibration]]")[0]
    head, _, rest = text.partition("[matrix.weight_cycles]")
    head, tail = (head, rest[rest.index("\n[") :]) if rest else text.split("\n[vector]\n", 1)
    tail = tail if rest else f"\n[vector]\n{tail}"
    entry = f'{pair} = {{ value = {cycles}, grade = "assumed", source = "test" }}'
    return f"{head}\n[matrix.weight_cycles]\n{entry}\n{tail}".encode()


@pytest.mark.parametrize("m", [1, 128])
def test_every_tile_of_weights_costs_its_cycles(m: int) -> None:
    text = preset("snapdragon-8-gen3")
    none, some = (parse_target(given(text, "fp16xint4", cycles), "t") for cycles in ("0.0", "41.5"))
    more = matmul_cost(some, m, 64, 96, "fp16xint4").cycles - matmul_cost(none, m, 64, 96, "fp16xint4").cycles
    assert more == 2 * 3 * 42
    assert matmul_cost(some, m, 64, 96, "int8xint8") == matmul_cost(none, m, 64, 96, "int8xint8")
    assert some.content_hash != none.content_hash


@pytest.mark.parametrize(("name", "pair"), [("systolic-128", "int8xint8"), ("snapdragon-8-gen3", "fp32xfp32")])
def test_cycles_without_tiles_or_rate_are_refused(name: str, pair: str) -> None:
    with pytest.raises(TargetError, match=f"matrix.weight_cycles.{pair} has no rate, must be a pair of matrix.macs"):
        parse_target(given(preset(name), pair, "4.0"), "t")
