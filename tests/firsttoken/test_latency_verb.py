import json

import pytest
from typer.testing import CliRunner

from firsttoken.cli import app

RUN = ["latency", "smollm2-135m", "--target", "systolic-128", "--prompt", "8", "--new-tokens", "2"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs that run a millisecond per row."""
    from firsttoken import latency

    monkeypatch.setattr(latency, "compile_step", lambda step, target: step)
    monkeypatch.setattr(latency, "time_of", lambda step, target: latency.StepTime(step.tokens / 1e3, 3, 2.0))


def test_the_screen_says_what_a_user_waits_for_and_where_it_goes() -> None:
    done = CliRunner().invoke(app, RUN)
    assert done.exit_code == 0, done.output
    for text in ("TTFT", "prefill", "TPOT", "decode", "per launch", "per operator", "8.00", "low to high"):
        assert text in done.output


def test_the_document_holds_the_same_numbers() -> None:
    found = json.loads(CliRunner().invoke(app, [*RUN, "--json"]).output)
    assert found["runtime"] == "default"
    assert found["ttft_ms"] == pytest.approx(8.0)
    assert found["tpot_ms"] == pytest.approx(1.0)
    assert found["parts"]["decode"]["device_s"] == pytest.approx(0.001)


def test_an_encoder_has_one_inference() -> None:
    found = json.loads(CliRunner().invoke(app, ["latency", "minilm-l6", "--target", "systolic-128", "--json"]).output)
    assert list(found["parts"]) == ["inference"]
    assert found["tpot_ms"] is None


def test_number_formats_are_those_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from firsttoken import latency

    steps: list[latency.Step] = []
    monkeypatch.setattr(latency, "compile_step", lambda step, target: steps.append(step) or step)
    asked = "--asymmetric --norm-cache off --residual-spill fp16 --kv-cache int8 --mix output=int8 --acts int16"
    done = CliRunner().invoke(app, [*RUN, *asked.split(), "--group", "channel", "--json"])
    assert done.exit_code == 0, done.output
    (options,) = {step.options for step in steps}
    assert (options.asymmetric, options.norm_cache, options.residual_spill) == (True, "off", "fp16")
    assert (options.acts, options.group, options.kv_cache) == ("int16", "channel", "int8")
    assert [rule.text() for rule in options.rules] == ["output=int8"]


def test_unknown_runtimes_are_named_with_those_that_there_are() -> None:
    from firsttoken_compiler.errors import TargetError

    with pytest.raises(TargetError, match="no runtime 'nothing', it has default"):
        CliRunner().invoke(app, [*RUN, "--runtime", "nothing"], catch_exceptions=False)
