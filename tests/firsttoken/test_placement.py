from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from firsttoken.generation import ort_session, token_feeds
from firsttoken.latency import LlmWork, Step, StepTime, compile_step, plan, predict
from firsttoken.options import RunOptions
from firsttoken.placement import EMBEDDED, EMBEDDING, HEAD, NORMED, host_s, without
from firsttoken.student import StudentConfig
from firsttoken_compiler.errors import StudentError
from firsttoken_compiler.target.target import Runtime, Target
from firsttoken_models.onnx_graph import build_graph
from firsttoken_models.registry import PROVIDER
from firsttoken_models.weights import EMBEDDING as TABLE
from firsttoken_models.weights import LM_HEAD, write_random_weights

IDS = [3, 1, 4, 1, 5]
BOTH = (EMBEDDING, HEAD)


@pytest.mark.parametrize("roles", [(EMBEDDING,), (HEAD,), BOTH])
def test_the_rest_of_the_graph_and_the_part_of_the_host_make_the_whole(
    tiny: StudentConfig, tmp_path: Path, roles: tuple[str, ...]
) -> None:
    weights = write_random_weights(tiny, tmp_path)
    whole = build_graph(tiny, tokens=len(IDS), past=0, weights=weights)
    rest = without(build_graph(tiny, tokens=len(IDS), past=0, weights=weights), roles)
    feeds = token_feeds(IDS)
    expected = ort_session(whole, weights, threads=1).run(["logits"], feeds)[0]
    table = weights.tensor(TABLE)
    if EMBEDDING in roles:
        feeds[EMBEDDED] = table[feeds.pop("input_ids")]
    found = ort_session(rest, weights, threads=1).run([NORMED if HEAD in roles else "logits"], feeds)[0]
    if HEAD in roles:
        found = found @ (table.T if tiny.tie_embeddings else weights.tensor(LM_HEAD))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    kept = {initializer.name for initializer in rest.graph.initializer}
    assert (TABLE in kept) == (roles != BOTH and (EMBEDDING not in roles or tiny.tie_embeddings))


def test_a_graph_without_ids_or_logits_is_refused() -> None:
    text = '<ir_version: 8, opset_import: ["": 17]> g (float[2] x) => (float[2] y) {y = Neg(x)}'
    model = onnx.parser.parse_model(text)
    with pytest.raises(StudentError, match="no Gather reads 'input_ids'"):
        without(model, (EMBEDDING,))
    with pytest.raises(StudentError, match="no MatMul makes 'logits'"):
        without(model, (HEAD,))


def test_the_host_reads_its_weights_or_computes() -> None:
    config = PROVIDER.config("smollm2-135m")
    target, runtime = Target.load("systolic-128"), Runtime(0.0, host_roles=(HEAD,), host_weight_bits=4.5)
    weights = config.vocab * config.hidden
    slow = replace(target.host, flops=1e9)
    assert host_s(config, 7, 1, runtime, target.host) == pytest.approx(weights * 4.5 / 8 / target.host.bytes_per_s)
    assert host_s(config, 7, 2, runtime, slow) == pytest.approx(2 * 2 * weights / 1e9)
    rows = replace(runtime, host_roles=(EMBEDDING,))
    assert host_s(config, 7, 1, rows, target.host) == pytest.approx(7 * 576 * (4.5 / 8 + 4) / target.host.bytes_per_s)
    assert host_s(config, 7, 1, replace(runtime, host_roles=()), target.host) == 0


def test_the_npu_is_left_without_the_products_of_the_head(llama: StudentConfig) -> None:
    target, options = Target.load("systolic-128"), RunOptions(weights="int8")
    macs = [
        sum(op.macs for op in compile_step(Step(llama, 4, 0, options, roles), target).ops) for roles in ((), (HEAD,))
    ]
    assert macs[0] - macs[1] == llama.vocab * llama.hidden


def test_time_of_the_host_is_a_part_of_its_own() -> None:
    class Nothing:
        def seconds(self, step: Step, target: Target) -> StepTime:
            assert step.host_roles == BOTH
            return StepTime(0.0, 0, 0.0)

    runtime = Runtime(0.0, host_roles=BOTH, host_weight_bits=4.5)
    target = replace(Target.load("systolic-128"), runtimes={"cpu": runtime})
    work = LlmWork("smollm2-135m", RunOptions(), 64, 0, 5)
    found = predict(work, target, Nothing())
    config = PROVIDER.config("smollm2-135m")
    assert found.ttft_ms == pytest.approx(1e3 * host_s(config, 64, 1, runtime, target.host))
    assert found.tpot_ms == pytest.approx(1e3 * host_s(config, 1, 1, runtime, target.host))
    assert plan(work, target).heads == {"prefill": 1, "decode": 5}
