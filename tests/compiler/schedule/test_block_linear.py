"""Products on blocks: the template of either method, executed, against numpy on the library's dequantised weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from kernel_bench import Bench, small_target

from firsttoken_compiler.codegen.block_products import build_choice
from firsttoken_compiler.formats.planes import join
from firsttoken_compiler.formats.types import BLOCK_TYPES, BlockType
from firsttoken_compiler.isa.types import Dtype, Space
from firsttoken_compiler.schedule import block_linear
from firsttoken_compiler.schedule.block_linear import METHODS, Account, plan
from firsttoken_compiler.schedule.block_trees import Blocks, operand_types
from firsttoken_compiler.schedule.choosing import legal_costs, ranked
from firsttoken_compiler.schedule.definitions import definition
from firsttoken_compiler.schedule.linear import Tile, operand_names
from firsttoken_compiler.schedule.spec import DTYPES, NAMES, Arg, KernelSpec
from firsttoken_compiler.schedule.tiling import Room
from firsttoken_compiler.target.target import Target

D, S = Space.DRAM, Space.SPAD
ROOM = Room(1 << 20, 1 << 20)


def operand_type(kind: BlockType, name: str) -> Dtype:
    return DTYPES[operand_types(kind)[name]]


@dataclass(frozen=True)
class Case:
    """A product on random blocks of a type."""

    kind: BlockType
    m: int
    n: int
    blocks: int
    tile: Tile
    method: str
    added: tuple[str, ...] = ()
    on_chip: frozenset[str] = frozenset()
    unit: tuple[int, int] = (8, 8)
    seed: int = 0
    in_bytes: bool = False
    """Whether the vector unit has lanes of bytes, and looks numbers up."""

    @property
    def k(self) -> int:
        return self.blocks * self.kind.block

    @property
    def target(self) -> Target:
        target = small_target(*self.unit)
        more = {"byte_lanes": 4 * target.vector.lanes, "table_entries": 16} if self.in_bytes else {}
        return replace(target, vector=replace(target.vector, **more))

    @property
    def spec(self) -> KernelSpec:
        planes = [Arg((self.k // p.per, self.n), operand_type(self.kind, p.name)) for p in self.kind.planes]
        shapes = {"bias": (self.n,), "residual": (self.m, self.n), "factor": (self.m, self.n)}
        params = {
            "acts": "fp16", "asymmetric": 0, "bias": int("bias" in self.added), "bits": self.kind.bits,
            "blocks": self.kind.name, "factor": int("factor" in self.added), "group": self.kind.group, "k": self.k,
            "n": self.n, "out": "float32", "residual": int("residual" in self.added), "silu": 0, "stored": 1,
            "zeros": 0,
        }  # fmt: skip
        args = [Arg((self.m, self.k), Dtype.F16), *planes, *(Arg(shapes[name], Dtype.F16) for name in self.added)]
        return KernelSpec("linear", tuple(params.items()), tuple(args), (Arg((self.m, self.n), Dtype.F32),))

    def arrays(self) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """(operands by name, the blocks)."""
        r = np.random.default_rng(self.seed)
        made: dict[str, np.ndarray] = {"a": r.standard_normal((self.m, self.k)).astype(np.float16)}
        planes: dict[str, np.ndarray] = {}
        for plane in self.kind.planes:
            shape = (self.k // plane.per, self.n)
            if plane.bits == 16:
                planes[plane.name] = r.standard_normal(shape).astype(np.float16)
            elif plane.bits == 8:
                planes[plane.name] = r.integers(-128, 128, shape, np.int8)
            else:
                planes[plane.name] = r.integers(0, 1 << plane.bits, shape, np.uint8)
            signed = operand_type(self.kind, plane.name) is Dtype.I4
            made[plane.name] = planes[plane.name].astype(np.int8) - 8 if signed else planes[plane.name]
        made["bias"] = r.standard_normal(self.n).astype(np.float16)
        for name in ("residual", "factor"):
            made[name] = r.standard_normal((self.m, self.n)).astype(np.float16)
        return made, join(planes, self.kind)

    def run(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(the result, what numpy says, the size of the sums' terms)."""
        spec, target = self.spec, self.target
        names = operand_names(spec)
        spaces = tuple(S if name in self.on_chip else D for name in names)
        chosen = plan(spec, spaces, self.method, target)
        assert chosen is not None
        choice = replace(chosen, tile=self.tile)
        template = build_choice(spec, choice, target)
        scratch, acc = Account(choice, spec, target).bytes(self.tile)
        assert template.scratch_bytes <= scratch
        assert template.acc_bytes <= acc
        made, blocks = self.arrays()
        panels = tuple(range(1, 1 + len(self.kind.planes))) + tuple(names.index(n) for n in ("bias",) if n in names)
        bench = Bench(spec, spaces, target, (*spec.args, *spec.outs), panels)
        result = bench.run(template, [made[name] for name in names[:-1]])[0]
        weights = dequantize(blocks, GGMLQuantizationType(self.kind.ggml))
        if self.method == "floats":
            weights = weights.astype(np.float16)
        w, a = weights.astype(np.float64).T, made["a"].astype(np.float64)
        expected, terms = a @ w, np.abs(a) @ np.abs(w)
        for name in self.added:
            value = made[name].astype(np.float64)
            expected = expected * value if name == "factor" else expected + value
            terms = terms * np.abs(value) if name == "factor" else terms + np.abs(value)
        return result, expected, terms


@st.composite
def cases(draw: st.DrawFn, kind: BlockType, method: str) -> Case:
    blocks, n, m = draw(st.integers(1, 3)), draw(st.integers(1, 37)), draw(st.integers(1, 9))
    blocks += method == "codes" and kind.block < 256
    deep = draw(st.integers(1, blocks))
    tile = Tile(draw(st.integers(1, m)), draw(st.integers(1, 4)), deep * kind.block, draw(st.booleans()))
    added = tuple(name for name in ("bias", "residual", "factor") if draw(st.booleans()))
    on_chip = draw(st.frozensets(st.sampled_from(["a", "out", "residual", "factor"])))
    tile = replace(tile, whole=tile.whole and "a" not in on_chip)
    tile = replace(tile, rows_outer=draw(st.booleans()), buffers=draw(st.integers(2, 3)))
    unit = draw(st.sampled_from([(8, 8), (16, 16), (32, 5)]))
    return Case(kind, m, n, blocks, tile, method, added, on_chip, unit, draw(st.integers(0, 99)), draw(st.booleans()))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", BLOCK_TYPES)
@settings(max_examples=4, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(data=st.data())
def test_products_are_those_of_the_dequantised_weights(name: str, method: str, data: st.DataObject) -> None:
    """Of fp16 weights rounded once, or of the weights themselves: up to the order of sums in fp32."""
    case = data.draw(cases(BLOCK_TYPES[name], method))
    result, expected, terms = case.run()
    assert (np.abs(result - expected) <= 2e-6 * terms + 1e-30).all()


def test_names_of_types_in_kernels() -> None:
    assert {NAMES[DTYPES[plane.dtype]] for kind in BLOCK_TYPES.values() for plane in kind.planes} == {
        "uint1", "uint2", "uint4", "int8", "float16",
    }  # fmt: skip


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_every_type_has_a_definition(name: str) -> None:
    kind = BLOCK_TYPES[name]
    assert definition(Case(kind, 2, 5, 2, Tile(2, 1, kind.block), "floats", ("bias",)).spec) is not None


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_what_the_tiles_of_a_list_share_is_made_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, str, int]] = []
    made = block_linear._vector

    def counted(blocks: Blocks, plan: block_linear.Choice, name: str, k: int, panel: int, target: Target) -> int:
        calls.append((plan.method, name, k))
        return made(blocks, plan, name, k, panel, target)

    monkeypatch.setattr(block_linear, "_vector", counted)
    kind = BLOCK_TYPES[name]
    case = Case(kind, 2, 20, 2, Tile(1, 1, kind.block), "floats", ("bias",))
    where = (D,) * len(operand_names(case.spec))
    listed = list(legal_costs(case.spec, where, case.target, ROOM))
    assert 0 < len(set(calls)) == len(calls) < len(listed) / 4
    for choice, cost in listed[::17]:
        assert ranked(case.spec, where, case.target, choice) == cost
