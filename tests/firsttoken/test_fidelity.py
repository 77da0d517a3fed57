"""What is measured of a student in low precision, against the same computed from the graphs by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from firsttoken import RunOptions, api
from firsttoken.fidelity import Reference, equipped, scores
from firsttoken.generation import token_feeds
from firsttoken.prose import Window
from firsttoken.student import StudentConfig
from firsttoken.subject import Built, subject_of
from firsttoken_compiler.errors import OptionError, StudentError
from firsttoken_compiler.target.target import Target
from firsttoken_models.registry import PROVIDER
from firsttoken_models.weights import FINAL_NORM, tensor_shapes, write_random_weights, write_weights

TOKENS = 12


@pytest.fixture
def student(qwen2: StudentConfig, tmp_path: Path) -> Built:
    return Built(PROVIDER, qwen2, write_random_weights(qwen2, tmp_path / "weights", seed=3), all_logits=True)


@pytest.fixture
def window() -> Window:
    ids = np.random.default_rng(5).integers(0, 128, TOKENS + 1).tolist()
    return Window(tuple(ids[:-1]), tuple(ids[1:]))


def measured(student: Built, window: Window, weights: str, **options: str) -> float:
    target, chosen = Target.load("systolic-128"), RunOptions(weights=weights, **options)
    found, nbytes = scores(student, Reference(student, TOKENS), chosen, target, [window])
    assert found.kl.shape == (TOKENS,)
    assert nbytes > 0
    return float(found.kl.mean())


def test_fp16_is_near_the_float_run_and_integers_are_further_the_fewer_their_bits(
    student: Built, window: Window
) -> None:
    fp16 = measured(student, window, "fp16")
    int8 = measured(student, window, "int8", acts="fp16", group="32")
    int4 = measured(student, window, "int4", acts="fp16", group="32")
    assert 0 < fp16 < 1e-4
    assert fp16 < int8 < int4


def test_logits_are_compared_token_by_token(student: Built, window: Window) -> None:
    """The program's logits at every position, and onnxruntime's of a graph that ends there."""
    target, options = Target.load("systolic-128"), RunOptions(weights="fp16")
    whole = Reference(student, TOKENS).logits(window)
    for length in (1, 5, TOKENS):
        part = Window(window.ids[:length], window.following[:length])
        np.testing.assert_allclose(Reference(student, length).logits(part)[-1], whole[length - 1], atol=2e-4)
    found, _ = scores(student, Reference(student, TOKENS), options, target, [window])
    assert found.same.mean() >= 0.9


def test_overflow_is_named(llama: StudentConfig, tmp_path: Path, window: Window) -> None:
    random = write_random_weights(llama, tmp_path / "random")
    shapes = tensor_shapes(llama)

    def loud(name: str) -> np.ndarray:
        array = np.array(random.tensor(name))
        return array * np.float32(4e4) if name == FINAL_NORM else array.reshape(shapes[name])

    student = Built(PROVIDER, llama, write_weights(llama, tmp_path / "loud", loud), all_logits=True)
    with pytest.raises(StudentError, match="logits that are not finite"):
        measured(student, window, "fp16")


def test_what_has_no_real_weights_has_no_quality() -> None:
    with pytest.raises(OptionError, match="give a student with real weights"):
        equipped(subject_of("deepseek-r1-distill-qwen-1.5b"))


def test_a_file_without_a_tokenizer_has_no_quality(tmp_path: Path) -> None:
    graph = '<ir_version: 10, opset_import: ["" : 18]> plain (float[1,4] x) => (float[1,4] y) { y = Relu (x) }'
    onnx.save(onnx.parser.parse_model(graph), tmp_path / "plain.onnx")
    with pytest.raises(OptionError, match="give a student with real weights"):
        equipped(subject_of(str(tmp_path / "plain.onnx")))


def test_a_file_that_is_absent_has_no_quality() -> None:
    with pytest.raises(StudentError, match=r"no such student: absent\.onnx"):
        equipped(subject_of("absent.onnx"))


def test_no_format_is_refused() -> None:
    with pytest.raises(OptionError, match="--weights names no format"):
        api.quality("smollm2-135m", formats=())


def test_smollm2_on_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """One short window of the real student; the reference's perplexity from a session opened here."""
    import onnxruntime

    monkeypatch.delenv("FIRSTTOKEN_CACHE")
    tokens = 24
    result = api.quality("smollm2-135m", formats=[RunOptions(weights="fp16")], windows=1, tokens=tokens)
    weights, tokenizer = PROVIDER.weights("smollm2-135m"), PROVIDER.tokenizer("smollm2-135m")
    assert weights is not None
    assert tokenizer is not None
    from firsttoken.prose import text

    ids = tokenizer.encode(text())[: tokens + 1]
    config = PROVIDER.config("smollm2-135m")
    model = PROVIDER.graph(config, tokens=tokens, past=0, weights=weights, all_logits=True)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights.path.parent))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], token_feeds(ids[:-1]))
    exact = np.exp(logits[0].astype(np.float64))
    chosen = exact[np.arange(tokens), ids[1:]] / exact.sum(axis=-1)
    by_hand = np.prod(chosen ** (-1 / tokens))
    assert result.reference_perplexity == pytest.approx(by_hand, rel=1e-6)
    (row,) = result.rows
    assert 0 < row.kl_mean < 1e-4
    assert row.top1_agreement == 1.0
    assert row.perplexity == pytest.approx(by_hand, rel=1e-2)
    assert row.perplexity_ratio == pytest.approx(row.perplexity / result.reference_perplexity)
    assert json.loads(result.to_json())["rows"][0]["weights"] == "fp16"
    print(f"KL {row.kl_mean:.2e}, perplexity {row.perplexity:.3f}, by hand {by_hand:.3f}")
