"""firsttoken_models.rotary: angles of scaled rotary positions against their definitions, one frequency at a time."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from firsttoken.rope import Llama3Scaling, LongRope
from firsttoken.student import StudentConfig
from firsttoken_models.onnx_graph import build_graph
from firsttoken_models.rotary import attention_factor, frequencies, rotary_caches
from firsttoken_models.students import DECODERS


def llama3(theta: float, dim: int, scaling: Llama3Scaling) -> list[float]:
    """As Meta's reference code has it: by wavelength, with three cases."""
    found = []
    for i in range(0, dim, 2):
        plain = theta ** (-i / dim)
        wavelength = 2 * math.pi / plain
        if wavelength < scaling.original_positions / scaling.high_freq_factor:
            found.append(plain)
        elif wavelength > scaling.original_positions / scaling.low_freq_factor:
            found.append(plain / scaling.factor)
        else:
            smooth = (scaling.original_positions / wavelength - scaling.low_freq_factor) / (
                scaling.high_freq_factor - scaling.low_freq_factor
            )
            found.append((1 - smooth) * plain / scaling.factor + smooth * plain)
    return found


@pytest.mark.parametrize("name", ["llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b"])
def test_llama3_scaling(name: str) -> None:
    config = DECODERS[name]
    assert isinstance(config.rope_scaling, Llama3Scaling)
    expected = llama3(5e5, config.head_dim, config.rope_scaling)
    np.testing.assert_allclose(frequencies(config, 64), expected, rtol=1e-12)
    plain = 5e5 ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
    kept, divided = np.isclose(expected, plain), np.isclose(expected, plain / config.rope_scaling.factor)
    assert kept.any()
    assert divided.any()
    assert not (kept | divided).all()
    assert attention_factor(config) == 1.0


def test_longrope_of_phi() -> None:
    config = DECODERS["phi-3.5-mini"]
    assert isinstance(config.rope_scaling, LongRope)
    plain = [1e4 ** (-2 * i / 96) for i in range(48)]
    for positions, divisors in ((64, config.rope_scaling.short), (4096, config.rope_scaling.short),
                                (4097, config.rope_scaling.long)):  # fmt: skip
        found = frequencies(config, positions)
        np.testing.assert_allclose(found, [p / d for p, d in zip(plain, divisors, strict=True)], rtol=1e-12)
    factor = math.sqrt(1 + math.log(32) / math.log(4096))
    assert attention_factor(config) == pytest.approx(factor)
    cos, sin = rotary_caches(config, 3)
    np.testing.assert_allclose(cos[0], np.full(48, factor), rtol=1e-6)
    np.testing.assert_allclose(sin[2], np.sin(2 * frequencies(config, 3)) * factor, rtol=1e-6)


def test_scaling_changes_nothing_but_the_tables(llama: StudentConfig) -> None:
    """No node and no shape: what a prompt costs is the same."""
    scaled = dataclasses.replace(llama, rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 32))
    plain, other = (build_graph(config, tokens=5, past=3).graph for config in (llama, scaled))
    assert list(plain.node) == list(other.node)
    changed = [a.name for a, b in zip(plain.initializer, other.initializer, strict=True) if a != b]
    assert changed == ["model.rotary_emb.cos_cache", "model.rotary_emb.sin_cache"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Llama3Scaling(0.5, 1.0, 4.0, 8192), "factor is 0.5, must be at least 1"),
        (lambda: Llama3Scaling(8.0, 4.0, 1.0, 8192), "must be positive and rise"),
        (lambda: Llama3Scaling(8.0, 1.0, 4.0, 1), "original_positions is 1"),
        (lambda: LongRope((1.0,), (1.0, 2.0), 4096), "1 short and 2 long divisors"),
        (lambda: LongRope((0.0,), (1.0,), 4096), "divisors must be finite and above 0"),
    ],
)
def test_bad_scaling_is_named(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]
