"""Results of the passes up to launches are kept by what decides them, and no program differs for it."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from cases import TINY

from firsttoken_compiler import front as module
from firsttoken_compiler.errors import FirsttokenError, OptionError, StudentError
from firsttoken_compiler.front import KEPT_LOWERED, KeptFronts
from firsttoken_compiler.frontend.onnx_file import OnnxStudent, from_model, open_student
from firsttoken_compiler.options import Precision, resolve
from firsttoken_compiler.pipeline import PIPELINE, compile_onnx
from firsttoken_compiler.schedule.choice import GraphChoice, ProductChoice, Schedules, kernel_key
from firsttoken_compiler.target.target import Target
from firsttoken_models.onnx_graph import build_graph

TARGET = Target.load("systolic-128")
INT4 = resolve("int4", None, "32", None)
FP16 = resolve("fp16", None, "32", None)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> KeptFronts:
    monkeypatch.setattr(module, "KEPT", KeptFronts())
    return module.KEPT


@pytest.fixture
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(module, "_key", lambda *_: None)
        yield


def student(tokens: int = 5, past: int = 3, name: str = "tiny") -> OnnxStudent:
    return from_model(build_graph(TINY, tokens=tokens, past=past), Path(), name)


def encoded(
    one: OnnxStudent, precision: Precision = INT4, target: Target = TARGET, schedules: Schedules | None = None
) -> bytes:
    program = compile_onnx(one, target, precision, schedules=schedules)
    assert program is not None
    return program.encode()


def cases() -> list[tuple[OnnxStudent, Precision, Target, Schedules | None]]:
    """Lengths, formats, targets of one and of several cores, and what schedules choose."""
    seen: list[object] = []
    compile_onnx(student(), TARGET, INT4, observe=lambda _, templates: seen.extend(templates))
    of = next(key for key in seen if key[0].kind == "linear")  # type: ignore[index]
    tile = Schedules(((kernel_key(*of), ProductChoice(5, 128, 64)),))  # type: ignore[misc]
    merged, norms = (Schedules(graph=GraphChoice(**{k: (v,)})) for k, v in (("merged", "qkv"), ("norms", "*=dram")))
    both = replace(TARGET, cores=2)
    return [
        (student(), INT4, TARGET, None), (student(), INT4, TARGET, tile), (student(), INT4, TARGET, merged),
        (student(), INT4, TARGET, norms), (student(), INT4, TARGET, None), (student(1, 9), INT4, TARGET, None),
        (student(), FP16, TARGET, None), (student(), replace(INT4, kv_cache="int8"), TARGET, None),
        (student(), replace(INT4, norm_cache="off"), TARGET, None), (student(), INT4, both, None),
        (student(), INT4, both, Schedules(graph=GraphChoice(cores=1))), (student(), INT4, both, None),
    ]  # fmt: skip


def test_programs_are_equal_to_the_byte_whether_or_not_anything_is_kept(
    kept: KeptFronts, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = cases()
    with monkeypatch.context() as patch:
        patch.setattr(module, "_key", lambda *_: None)
        expected = [encoded(*case) for case in wanted]
    assert not [front.kept for front in kept.kept.values() if front.kept is None]
    assert [encoded(*case) for case in wanted] == expected
    assert [encoded(*case) for case in reversed(wanted)] == expected[::-1]
    assert len(set(expected)) >= 7


def test_the_passes_run_once_for_equal_graphs_and_again_for_others(
    kept: KeptFronts, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    run = module._front
    monkeypatch.setattr(module, "_front", lambda one, *rest: ran.append(one.name) or run(one, *rest))
    for _ in range(3):
        encoded(student())
    assert ran == ["tiny"]
    others = [
        (student(6), INT4, TARGET), (student(name="other"), INT4, TARGET), (student(), FP16, TARGET),
        (student(), INT4, replace(TARGET, clock_hz=TARGET.clock_hz * 2)),
    ]  # fmt: skip
    for other in others:
        encoded(*other)
    assert len(ran) == 5
    assert len(kept.kept) == kept.limit == 2


def test_every_pass_is_heard_of_when_nothing_of_it_runs(kept: KeptFronts) -> None:
    def heard() -> list[float]:
        done: list[float] = []
        compile_onnx(student(), TARGET, INT4, progress=lambda _stage, at, _total: done.append(at))
        return sorted({at for at in done if at == int(at)})

    first = heard()
    assert len(kept.kept) == 1
    assert heard() == first == [float(number) for number in range(1, len(PIPELINE) + 1)]


def test_what_is_written_or_stopped_at_comes_from_passes_that_run(kept: KeptFronts, tmp_path: Path) -> None:
    encoded(student())
    compile_onnx(student(), TARGET, INT4, dump_after="all", dump_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) >= len(PIPELINE) - 1
    assert compile_onnx(student(), TARGET, INT4, stop_after="import") is None


def test_a_compilation_that_fails_leaves_nothing_wrong_behind(kept: KeptFronts) -> None:
    expected = encoded(student())
    kept.kept.clear()
    bad = replace(TARGET, scratchpad=replace(TARGET.scratchpad, bytes=4096))
    for _ in range(2):
        with pytest.raises(FirsttokenError):
            encoded(student(), target=bad)
        with pytest.raises(OptionError):
            encoded(student(), schedules=Schedules(graph=GraphChoice(cores=9)))
    assert encoded(student()) == expected
    graph = build_graph(TINY, tokens=5, past=3)
    graph.graph.node.append(onnx.helper.make_node("Xyz", [graph.graph.output[0].name], ["more"], domain="own"))
    graph.graph.output.append(onnx.helper.make_tensor_value_info("more", 1, None))
    before = len(kept.kept)
    for _ in range(2):
        with pytest.raises(StudentError):
            compile_onnx(from_model(graph, Path(), "bad"), TARGET, INT4, fallback=False)
    assert len(kept.kept) == before


def test_lowered_forms_are_few(kept: KeptFronts) -> None:
    for name in "abcdefg":
        encoded(student(), schedules=Schedules(graph=GraphChoice(norms=(f"{name}*=dram",))))
    (front,) = kept.kept.values()
    assert isinstance(front.kept, OrderedDict)
    assert len(front.kept) == KEPT_LOWERED


def test_values_in_the_file_decide_and_weights_beside_it_are_not_kept(kept: KeptFronts, tmp_path: Path) -> None:
    def file(value: float, outside: bool) -> OnnxStudent:
        weight = onnx.numpy_helper.from_array(np.full((64, 64), value, np.float32), "w")
        scale = onnx.numpy_helper.from_array(np.full(64, value, np.float32), "s")
        nodes = [onnx.helper.make_node("Mul", ["x", "s"], ["y"]), onnx.helper.make_node("MatMul", ["y", "w"], ["z"])]
        x, z = (onnx.helper.make_tensor_value_info(name, 1, [4, 64]) for name in "xz")
        model = onnx.helper.make_model(
            onnx.helper.make_graph(nodes, "g", [x], [z], [weight, scale]),
            opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8,
        )  # fmt: skip
        onnx.save(model, str(tmp_path / "m.onnx"), save_as_external_data=outside, location="m.data", size_threshold=0)
        return open_student(tmp_path / "m.onnx")

    encoded(file(1.0, outside=False), FP16)
    encoded(file(2.0, outside=False), FP16)
    assert len(kept.kept) == 2
    kept.kept.clear()
    encoded(file(1.0, outside=True), FP16)
    assert not kept.kept


def test_a_graph_again_with_another_tile_takes_less_than_half_the_time(kept: KeptFronts) -> None:
    longer = replace(TINY, layers=8)
    one = from_model(build_graph(longer, tokens=7, past=0), Path(), "longer")
    taken = []
    for _ in range(3):
        started = time.process_time()
        compile_onnx(one, TARGET, INT4)
        taken.append(time.process_time() - started)
    assert min(taken[1:]) < taken[0] / 2
