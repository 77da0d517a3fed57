"""firsttoken_models.registry: the built-in provider."""

from __future__ import annotations

import pytest

from firsttoken.student import StudentProvider, UnknownStudent, find_student
from firsttoken_models.registry import PROVIDER


def test_it_is_the_installed_provider() -> None:
    provider: StudentProvider = PROVIDER
    assert find_student("smollm2-135m")[0] is provider
    assert PROVIDER.names()[:2] == ("deepseek-r1-distill-qwen-1.5b", "smollm2-135m")
    assert [PROVIDER.config(name).name for name in PROVIDER.names()] == list(PROVIDER.names())


def test_a_student_without_weights_still_has_a_graph() -> None:
    config = PROVIDER.config("deepseek-r1-distill-qwen-1.5b")
    assert PROVIDER.weights(config.name) is None
    assert PROVIDER.tokenizer(config.name) is None
    assert len(PROVIDER.graph(config, tokens=1, past=8).graph.node) > 500


@pytest.mark.parametrize("method", ["config", "weights", "tokenizer"])
def test_unknown_names(method: str) -> None:
    with pytest.raises(UnknownStudent, match="unknown student 'gpt-9'"):
        getattr(PROVIDER, method)("gpt-9")
