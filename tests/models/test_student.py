"""firsttoken.student: dimensions, validation, content text, plug-ins."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata

import pytest

from firsttoken import student
from firsttoken.rope import Llama3Scaling, LongRope
from firsttoken.student import LayerConfig, ProviderError, StudentConfig, UnknownStudent, find_student, providers


@pytest.fixture
def fresh_providers() -> Iterator[None]:
    providers.cache_clear()
    yield
    providers.cache_clear()


def with_entry(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    entry = metadata.EntryPoint("broken", value, student.ENTRY_POINT_GROUP)
    monkeypatch.setattr(metadata, "entry_points", lambda group: metadata.EntryPoints([entry]))


def test_parameters_count_every_tensor_once(llama: StudentConfig, qwen2: StudentConfig, uneven: StudentConfig) -> None:
    block = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 96 + 2 * 64
    assert llama.parameters == 128 * 64 + 64 + 2 * block
    block = 64 * 96 + 2 * 64 * 48 + 96 * 64 + 3 * 64 * 96 + 2 * 64 + 96 + 2 * 48
    assert qwen2.parameters == 2 * 128 * 64 + 64 + 2 * block
    spelled_out = dataclasses.replace(qwen2, per_layer=(LayerConfig(4, 2, 96),) * 2)
    assert spelled_out.parameters == qwen2.parameters
    assert uneven.kv_bytes_per_token() == 2 * (2 + 1 + 3) * 24 * 2
    assert llama.kv_bytes_per_token(1) == 2 * 2 * 2 * 16


def test_layer_is_uniform_unless_overridden(llama: StudentConfig, uneven: StudentConfig) -> None:
    assert llama.layer(1) == LayerConfig(4, 2, 96)
    assert uneven.layer(1) == LayerConfig(6, 1, 32, 4)
    for index in (-1, 2):
        with pytest.raises(IndexError, match=rf"layer {index} does not exist, layers are 0 to 1"):
            llama.layer(index)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": LongRope((1.0,), (2.0,), 8)}, r"rope_scaling has 1 divisors, .* each of the 8 pairs"),
        ({"name": ""}, r"name is empty"),
        ({"family": "bert"}, r"family is 'bert', must be one of \('llama', 'qwen2', 'qwen3', 'phi3'\)"),
        ({"hidden": 0}, r"hidden is 0, must be an integer of at least 1"),
        ({"vocab": 1.5}, r"vocab is 1.5, must be an integer"),
        ({"layers": True}, r"layers is True, must be an integer"),
        ({"heads": 5}, r"heads is 5, not a multiple of kv_heads 2; use 4 or 6 heads"),
        ({"heads": 1}, r"heads is 1, not a multiple of kv_heads 2; use 2 or 2 heads"),
        ({"kv_heads": 0}, r"kv_heads is 0"),
        ({"head_dim": 15}, r"head_dim is 15, must be even .* use 16"),
        ({"rope_theta": 0.0}, r"rope_theta is 0.0"),
        ({"rope_theta": float("nan")}, r"rope_theta is nan"),
        ({"rms_eps": 0.0}, r"rms_eps is 0.0"),
        ({"per_layer": (LayerConfig(4, 2, 8),)}, r"per_layer has 1 entries, must have one for each of the 2 layers"),
    ],
)
def test_bad_dimensions_are_named(llama: StudentConfig, change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(llama, **change)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, 2, 8), r"heads is 3, not a multiple of kv_heads 2; use 2 or 4 heads"),
        ((4, 2, 0), r"intermediate is 0"),
        ((4, 2, 8, 5), r"weight_bits is 5, must be one of \(4, 8, 16\) or None"),
    ],
)
def test_bad_layers_are_named(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LayerConfig(*arguments)


def test_canonical_text_follows_the_content(llama: StudentConfig, uneven: StudentConfig) -> None:
    text = llama.canonical_json()
    assert json.loads(text)["hidden"] == 64
    renamed = dataclasses.replace(llama, name="other", source="elsewhere", rope_theta=10000)
    assert renamed.canonical_json() == text
    assert dataclasses.replace(llama, per_layer=(LayerConfig(4, 2, 96),) * 2).canonical_json() == text
    assert dataclasses.replace(llama, per_layer=(LayerConfig(4, 2, 96, 4),) * 2).canonical_json() != text
    scalings = Llama3Scaling(8.0, 1.0, 4.0, 32), Llama3Scaling(9.0, 1.0, 4.0, 32), LongRope((1.0,) * 8, (2.0,) * 8, 32)
    stretched = {dataclasses.replace(llama, rope_scaling=scaling).canonical_json() for scaling in scalings}
    assert len({text, *stretched}) == 4
    assert dataclasses.replace(llama, qk_norm=True).canonical_json() != text
    assert dataclasses.replace(uneven, heads=8, kv_heads=4).canonical_json() == uneven.canonical_json()
    for field in dataclasses.fields(llama):
        value = getattr(llama, field.name)
        if type(value) in (int, float):
            assert dataclasses.replace(llama, **{field.name: value * 2}).canonical_json() != text, field.name


def test_a_search_can_build_thousands(llama: StudentConfig) -> None:
    start = time.process_time()
    for width in range(1, 2001):
        dataclasses.replace(llama, per_layer=(LayerConfig(4, 2, width), LayerConfig(2, 2, width)))
    assert time.process_time() - start < 1.0


def test_import_is_light() -> None:
    script = (
        "import sys, firsttoken_models.registry, firsttoken.student as s; s.find_student('smollm2')\n"
        "print({'onnx', 'gguf', 'tokenizers', 'numpy', 'onnxruntime', 'tvm'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_builtin_students_are_found() -> None:
    assert len(providers()) >= 1
    provider, config = find_student("DeepSeek-R1-Distill-Qwen-1.5B")
    assert config.name in provider.names()


def test_unknown_student_names_the_nearest() -> None:
    with pytest.raises(UnknownStudent, match=r"unknown student 'smolm2-135m'; nearest names: smollm2-135m"):
        find_student("smolm2-135m")
    with pytest.raises(ValueError, match=r"known students: deepseek-r1-distill-qwen-1.5b, smollm2-135m, "):
        find_student("zzz")


@pytest.mark.usefixtures("fresh_providers")
def test_no_provider_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "entry_points", lambda group: metadata.EntryPoints([]))
    with pytest.raises(UnknownStudent, match="no provider is installed"):
        find_student("smollm2-135m")


@pytest.mark.usefixtures("fresh_providers")
def test_a_broken_plugin_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with_entry(monkeypatch, "no_such_module:PROVIDER")
    with pytest.raises(ProviderError, match=r"plug-in 'broken' \(no_such_module:PROVIDER\) cannot be loaded"):
        providers()
