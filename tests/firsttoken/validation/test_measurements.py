"""Rows as works: chips, students, number formats, runtimes, and which quantities count."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from measurement_tables import models, operators, table

from firsttoken.student import find_any
from firsttoken.validation import kernel_rows
from firsttoken.validation.chips import chip_of
from firsttoken.validation.measurements import Measurement, MeasurementError, Skipped, parse, read
from firsttoken.validation.model_rows import energy, power
from firsttoken.validation.number_formats import HEAD_INT8, formats_of
from firsttoken.validation.runtimes import runtime_of
from firsttoken.validation.students import student_of
from firsttoken.validation.table import FORMS

FACTS = Path(__file__).parents[4] / "shared" / "facts"


def one(**change: str) -> Measurement:
    (row,) = parse(models(change), "t.csv")
    assert isinstance(row, Measurement), row
    return row


def reason(**change: str) -> str:
    (row,) = parse(models(change), "t.csv")
    assert isinstance(row, Skipped)
    return row.reason


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("Snapdragon 8 Elite (HTP v79)", "snapdragon-8-elite"), ("Snapdragon X Elite CRD", "snapdragon-x-elite"),
        ("Snapdragon X Plus 8-Core", "snapdragon-x-elite"), ("Snapdragon X2 Elite (HTP v81)", "snapdragon-x2-elite"),
        ("Snapdragon 8 Gen 3 (OnePlus 12)", "snapdragon-8-gen3"), ("RK3588S", "rk3588"), ("rockchip rk3576", "rk3576"),
        ("AMD XDNA2 NPU2 (Strix, AIE2P 8x4)", "xdna2-strix"), ("TPU v4", "tpu-v4"), ("Google TPUv3", "tpu-v3"),
        ("Arm Ethos-U85 2048", "ethos-u85-2048"), ("NVDLA full", "nvdla-full"),
    ],
)  # fmt: skip
def test_chips(text: str, target: str) -> None:
    assert chip_of(text).target == target


@pytest.mark.parametrize(
    "text", ["Snapdragon 8 Gen 3 (Adreno GPU)", "Apple A15 ANE", "Snapdragon 8 Elite Gen 5", "TPU v4i", "Oryon CPU", ""]
)
def test_chips_without_a_target_say_why(text: str) -> None:
    assert chip_of(text).target == ""
    assert chip_of(text).refusal


@pytest.mark.parametrize(
    ("name", "params", "student"),
    [
        ("llama_v3_2_1b_instruct", "1.24B", "llama-3.2-1b"), ("llama_v3_2_3b_instruct", "", "llama-3.2-3b"),
        ("llama_v3_1_8b_instruct", "8B", "llama-3.1-8b"), ("Llama-3.2-1B", "1.24B", "llama-3.2-1b"),
        ("llama3.2-1b", "", "llama-3.2-1b"), ("meta-llama/Llama-3.2-3B-Instruct", "", "llama-3.2-3b"),
        ("qwen3_1_7b", "1.72B", "qwen3-1.7b"), ("qwen3_4b", "", "qwen3-4b"), ("Qwen3-0.6B", "0.6B", "qwen3-0.6b"),
        ("qwen3_4b_instruct_2507", "", "qwen3-4b"), ("qwen2_5_1_5b_instruct", "", "qwen2.5-1.5b"),
        ("Qwen2-1.5B", "1.5B", "qwen2-1.5b"), ("Qwen2.5", "1.5B", "qwen2.5-1.5b"), ("Qwen2.5", "3B", "qwen2.5-3b"),
        ("Qwen3", "0.6B", "qwen3-0.6b"), ("qwen2_0_5b", "", "qwen2-0.5b"), ("TinyLLAMA", "1.1B", "tinyllama-1.1b"),
        ("Phi3", "3.8B", "phi-3.5-mini"), ("phi_3_5_mini_instruct", "", "phi-3.5-mini"),
        ("MiniLM-L6-v2", "22.7M", "minilm-l6"), ("minilm_v2", "", "minilm-l6"),
        ("BERT-base (masked LM head, one position)", "110M", "bert-base"), ("bert_base_uncased_hf", "", "bert-base"),
        ("DistilBERT-base (ane_transformers)", "66M", "distilbert"), ("SmolLM2", "135M", "smollm2-135m"),
        ("SmolLM2-1.7B-Instruct", "", "smollm2-1.7b"), ("smollm2_360m_instruct", "", "smollm2-360m"),
        ("DeepSeek-R1-Distill-Qwen-1.5B (NPU-optimised ONNX QDQ)", "1.78B", "deepseek-r1-distill-qwen-1.5b"),
        ("deepseek_r1_distill_llama_8b", "", "llama-3.1-8b"), ("Meta-Llama-3-8B-Instruct", "", "llama-3.1-8b"),
    ],
)  # fmt: skip
def test_students(name: str, params: str, student: str) -> None:
    config, why = student_of(name, params)
    assert config is not None, why
    assert config.name == student


@pytest.mark.parametrize(
    ("name", "params", "why"),
    [
        ("ChatGLM3", "6B", "no student"), ("Qwen2.5", "7B", "no student"), ("qwen2_5_vl_3b", "", "no student"),
        ("llama_v3_2_3b_instruct_ssd", "", "speculative decoding"), ("Qwen3-1.7B", "4B", "has 4B parameters, the"),
        ("deepseek_r1_distill_qwen_7b", "", "no student"), ("", "", "no student"), ("../etc/passwd", "", "no student"),
    ],
)  # fmt: skip
def test_models_without_a_student_say_why(name: str, params: str, why: str) -> None:
    config, said = student_of(name, params)
    assert config is None
    assert why in said


@pytest.mark.parametrize(
    ("weights", "acts", "notes", "runtime", "expected"),
    [
        ("4", "16", "", "genie", ("int4", "int16", "channel", "int8", (HEAD_INT8,))),
        ("4", "fp16", "", "geniex_qairt", ("int4", "fp16", "channel", "int8", (HEAD_INT8,))),
        ("4", "fp16 (HMX)", "", "geniex_llamacpp", ("q4_0", "fp16", "128", "int8", ())),
        ("4", "16", "dtype w4a16_g128; new_tokens=64", "rkllm", ("int4", "fp16", "128", "fp16", ())),
        ("4", "16", "dtype w4a16", "rkllm", ("int4", "fp16", "channel", "fp16", ())),
        ("8", "8", "dtype w8a8_g128", "rkllm", ("int8", "int8", "128", "fp16", ())),
        ("8", "16", "", "onnx", ("int8", "int16", "channel", "fp16", ())),
        ("bf16", "bf16", "", "mlir_air", ("fp16", "fp16", "128", "fp16", ())),
        ("fp16", "fp16", "", "qnn_dlc", ("fp16", "fp16", "128", "fp16", ())),
    ],
)
def test_number_formats(weights: str, acts: str, notes: str, runtime: str, expected: tuple[object, ...]) -> None:
    options = formats_of(weights, acts, notes, runtime).options
    assert options is not None
    assert (options.weights, options.acts, options.group, options.kv_cache, options.rules) == expected


@pytest.mark.parametrize(
    ("weights", "acts", "notes"), [("3", "8", ""), ("4", "?", ""), ("4", "8", "w4a8_g7"), ("", "8", "")]
)
def test_formats_that_do_not_exist_say_so(weights: str, acts: str, notes: str) -> None:
    found = formats_of(weights, acts, notes, "default")
    assert found.options is None
    assert found.refusal


def test_runtimes() -> None:
    assert runtime_of("snapdragon-x-elite", "n_gen=128; runtime geniex_llamacpp", "qai-hub-models") == "geniex_llamacpp"
    assert runtime_of("snapdragon-x-elite", "", "models/x/perf.yaml (w4, CRD, geniex_qairt)") == "geniex_qairt"
    assert runtime_of("snapdragon-x-elite", "Genie, burst perf profile", "") == "genie"
    assert runtime_of("snapdragon-8-gen3", "QNN 2.29 NPU", "PowerServe README.md") == "powerserve"
    assert runtime_of("snapdragon-8-gen3", "", "perf.yaml (float,qnn_dlc,Samsung)") == "qnn_dlc"
    assert runtime_of("rk3588", "", "") == "rkllm"
    assert runtime_of("tpu-v4", "") == "xla"
    assert runtime_of("nvdla-full", "") == "default"


def test_a_row_of_a_language_model() -> None:
    row = one(prompt_tokens="64", context="320", notes="dtype w8a8_g128; new_tokens=256")
    assert (row.target, row.model, row.line) == ("rk3588", "tinyllama-1.1b", 2)
    assert (row.work.prompt, row.work.context, row.work.new_tokens) == (64, 320, 256)
    assert row.counted == {"ttft_ms": 243.93, "decode_tok_s": 24.43}
    assert row.setting == "64 tokens, context 320, int8 by 128, int8 activations, rkllm"


def test_an_encoder_has_an_inference() -> None:
    row = one(chip="Snapdragon 8 Elite", model="MiniLM-L6-v2", params="22.7M", prompt_tokens="seq 128", ttft_ms="0.5",
              decode_tok_s="", source="perf.yaml (w8a8,onnx,S25)", notes="")  # fmt: skip
    assert row.counted == {"inference_ms": 0.5}
    assert row.work.tokens == 128
    assert row.setting.endswith("onnx")


def test_an_image_network_on_nvdla_in_the_size_of_the_row() -> None:
    row = one(chip="NVDLA 512 INT8 MACs, 256 KB CBUF, 10 GB/s, 1 GHz 16 nm", model="ResNet-50 INT8", params="25.5M",
              prompt_tokens="224x224", ttft_ms="10.75", decode_tok_s="", power_w="0.210/0.080 (peak/avg)",
              notes="no DRAM power", source="")  # fmt: skip
    assert (row.target, row.model) == ("nvdla-full", "resnet-50")
    assert row.work.student == find_any("resnet-50")[1]  # the built-in student, of 224 pixels a side
    assert row.variant is not None
    assert row.variant.scratchpad.bytes == 256 << 10
    assert row.variant.dram.peak_bytes_per_s == pytest.approx(10e9, rel=0.01)
    assert row.counted == {"inference_ms": 10.75}
    assert "static" in row.work.options.meta()["acts_range"]
    smaller = one(chip="NVDLA 512 INT8 MACs, 256 KB CBUF, 10 GB/s, 1 GHz 16 nm", model="resnet50", params="25.5M",
                  prompt_tokens="64x64", ttft_ms="1", decode_tok_s="", notes="", source="")  # fmt: skip
    assert (smaller.work.student.side, row.work.student.side) == (64, 224)
    assert "it takes 32 to 1024" in reason(
        chip="NVDLA 512 INT8 MACs, 256 KB CBUF, 10 GB/s, 1 GHz 16 nm", model="ResNet-50", prompt_tokens="4000x4000",
        params="25.5M",
    )  # fmt: skip
    assert reason(chip="NVDLA 777 MACs, 256 KB, 10 GB/s", model="ResNet-50") != ""


def test_a_rate_that_follows_from_the_time_is_no_second_measurement() -> None:
    row = one(prefill_tok_s="524.7")
    assert {q.name: bool(q.apart) for q in row.quantities} == {
        "ttft_ms": False, "prefill_tok_s": True, "decode_tok_s": False,
    }  # fmt: skip
    assert "prefill_tok_s" in one(prefill_tok_s="700").counted
    inferred = one(prefill_tok_s="524.7", notes="prompt length inferred from chunks")
    assert inferred.counted == {"prefill_tok_s": 524.7, "decode_tok_s": 24.43}
    assert one(ttft_ms="", prefill_tok_s="524.7").counted == {"prefill_tok_s": 524.7, "decode_tok_s": 24.43}


def test_geniex_measures_the_context_of_3072_with_the_prompt_for_2048() -> None:
    change = {
        "chip": "Snapdragon 8 Elite", "model": "qwen3_1_7b", "params": "", "prompt_tokens": "2688", "context": "3072",
        "ttft_ms": "1012.5", "prefill_tok_s": "2654.8", "notes": "prompt length inferred; runtime geniex_qairt",
    }  # fmt: skip
    row = one(**change)
    assert (row.work.prompt, row.work.context) == (1792, 3072)
    assert row.counted == {"prefill_tok_s": 2654.8, "decode_tok_s": 24.43}
    assert "1792 tokens" in row.assumed[0]
    assert one(**change | {"notes": "runtime geniex_qairt"}).work.prompt == 2688


def test_what_a_table_calls_unreliable_is_apart() -> None:
    assert one(confidence="high for TTFT; LOW for decode (contradicts others)").counted == {"ttft_ms": 243.93}
    assert one(confidence="low").counted == {}
    assert one(confidence="medium-high").counted == {"ttft_ms": 243.93, "decode_tok_s": 24.43}
    assert one(ttft_ms="<250").counted == {"decode_tok_s": 24.43}


def test_an_open_length_is_assumed_and_its_prefill_apart() -> None:
    row = one(prompt_tokens="unstated (assets/prompts)")
    assert row.counted == {"decode_tok_s": 24.43}
    assert row.assumed[0] == "the prompt's length is not stated: 128 tokens"
    row = one(prompt_tokens="<64")
    assert row.counted == {"ttft_ms": 243.93, "decode_tok_s": 24.43}
    assert row.work.prompt == 64


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"chip": "RK3588 (Mali GPU)"}, "a GPU, which is not modelled"),
        ({"chip": "Apple M4"}, "no target for the chip 'Apple M4'"),
        ({"model": "InternLM2"}, "no student for the model 'InternLM2'"),
        ({"weight_bits": "2"}, "no number format"),
        ({"ttft_ms": "", "decode_tok_s": ""}, "no value that is predicted"),
        ({"context": "4096"}, "4096 tokens, and tinyllama-1.1b has 2048 positions"),
    ],
)
def test_rows_that_are_not_run_say_why(change: dict[str, str], why: str) -> None:
    assert why in reason(**change)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"ttft_ms": "soon"}, "t.csv, line 2, column ttft_ms: 'soon' is not a number above 0"),
        ({"prompt_tokens": "many"}, "column prompt_tokens: 'many' is not a length such as 128"),
        ({"context": "wide"}, "column context: 'wide' is not a number of tokens"),
        ({"chip": "Apple M4", "decode_tok_s": "-1"}, "column decode_tok_s"),
    ],
)
def test_malformed_rows_are_errors(change: dict[str, str], says: str) -> None:
    with pytest.raises(MeasurementError) as error:
        parse(models(change), "t.csv")
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("text", "value", "bound"),
    [
        ("0.454", 0.454, ""), ("<5 (whole device, decode, batch 1-16)", 5.0, "<"),
        ("0.766/0.291 (peak/avg)", 0.291, ""), ("12.21 peak / 10.38 plateau", 10.38, ""),
        ("0.291/0.766 (avg/peak)", 0.291, ""),
    ],
)  # fmt: skip
def test_power(text: str, value: float, bound: str) -> None:
    found = power(text)
    assert found is not None
    assert (found.value, found.bound) == (value, bound)


def test_energy() -> None:
    assert (energy("146 mJ/token") or energy("1 J")).value == 146  # type: ignore[union-attr]
    derived = energy("1.58 mJ/inference (derived)")
    assert derived is not None
    assert derived.apart
    assert energy("little") is None
    assert power("little") is None


@pytest.fixture
def operators_as_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever operator there is can be compiled."""
    monkeypatch.setattr(kernel_rows, "work_of", lambda operator, runtime: operator)


@pytest.mark.usefixtures("operators_as_works")
def test_rows_of_operators() -> None:
    rows = parse(operators(
        ("AMD XDNA2 NPU2", "GEMM bf16_in_fp32_out", "512x512x256", "150"),
        ("AMD XDNA2 NPU2", "GEMM bf16_in_fp32_out", "512x512x256", "120"),
        ("AMD XDNA2 NPU2", "EltwiseAdd bf16", "2048 (2x1024)", "12"),
        ("AMD XDNA2 NPU2", "Sorting bf16", "2048", "12"),
        ("AMD XDNA2 NPU2", "GEMV bf16", "512x256", ""),
    ), "t.csv")  # fmt: skip
    slow, fast, add, unknown, untimed = rows
    assert isinstance(slow, Measurement)
    assert isinstance(fast, Measurement)
    assert isinstance(add, Measurement)
    assert (slow.counted, fast.counted, add.counted) == ({}, {"time_us": 120.0}, {"time_us": 12.0})
    assert "faster in line 3" in slow.quantities[0].apart
    assert isinstance(unknown, Skipped)
    assert "no operator" in unknown.reason
    assert isinstance(untimed, Skipped)
    assert "no time" in untimed.reason


@pytest.mark.parametrize(
    ("op", "shape"),
    [("GEMM bf16", "512x512"), ("GEMM bf16", "512x0x512"), ("RoPE bf16", "512"), ("FlashAttention bf16", "lq1 lk1"),
     ("GEMM bf16", f"{'9' * 30}x1x1")],
)  # fmt: skip
def test_malformed_shapes_are_errors(op: str, shape: str) -> None:
    with pytest.raises(MeasurementError, match="line 2, column shape"):
        parse(operators(("AMD XDNA2 NPU2", op, shape, "1")), "t.csv")


@pytest.mark.usefixtures("operators_as_works")
def test_cycles_and_products() -> None:
    (row,) = parse(table(("workload", "tpu_v3_measured_cycles"), {"workload": "gemm_256x128x64",
                         "tpu_v3_measured_cycles": "940"}), "t.csv")  # fmt: skip
    assert isinstance(row, Measurement)
    assert row.target == "tpu-v3"
    assert row.quantities[0].value == pytest.approx(1.0, rel=0.01)
    columns = ("chip", "op", "M", "N", "K", "dtype", "time_us", "source")
    cell = {"chip": "TPU v4", "op": "layer_norm", "M": "12", "N": "128", "K": "2560", "time_us": "3"}
    (row,) = parse(table(columns, cell), "t.csv")
    assert isinstance(row, Measurement)
    assert row.model.startswith("layer_norm 1536x2560 ")


WORDS = st.one_of(
    st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=12),
    st.sampled_from([
        "Snapdragon 8 Elite", "NVDLA 2048 MACs, 512 KB, 20 GB/s", "NVDLA 7 MACs, 1 KB, 0 GB/s", "RK3588", "qwen3_1_7b",
        "MiniLM-L6-v2", "ResNet-50 INT8", "1.7B", "w4a16_g128", "q4_0", "<64", "seq 128", "224x224", "999999", "0",
        "1e308", "LOW for decode", "no DRAM power", "5 W", "<5", "1/2 (peak/avg)", "7 mJ", "prompt length inferred",
    ]),
)  # fmt: skip
MATMULS = st.sampled_from(["GEMM bf16", "GEMV", "RoPE", "FlashAttention", "softmax", "bert", "layernorm", "bandwidth"])


def outcome(data: bytes) -> bool:
    """Whether every row is a measurement, skipped with a reason, or refused by its line; a bare \\r ends a row too."""
    try:
        rows = parse(data, "t.csv")
    except MeasurementError as error:
        return "t.csv, line " in str(error)
    return len(rows) >= 1 and all(isinstance(row, Measurement) or bool(row.reason) for row in rows)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from([*FORMS["models"]]), WORDS, max_size=6))
def test_whatever_stands_in_a_row_is_run_skipped_or_refused(change: dict[str, str]) -> None:
    assert outcome(models(change))


@settings(deadline=None)
@given(WORDS, MATMULS, WORDS, WORDS)
def test_whatever_stands_in_a_row_of_an_operator(chip: str, op: str, shape: str, time: str) -> None:
    assert outcome(operators((chip, op, shape, time)))


@pytest.mark.usefixtures("operators_as_works")
@pytest.mark.skipif(not FACTS.is_dir(), reason="the tables of measurements are not here")
@pytest.mark.parametrize(
    ("name", "rows", "skipped"),
    [
        ("silicon_calibration.csv", 95, 2), ("tpu_v3_kernels_calibration.csv", 8, 0),
        ("tpu_v4_kernels_calibration.csv", 114, 0), ("xdna2_kernel_microbench.csv", 170, 3),
    ],
)  # fmt: skip
def test_every_row_of_the_tables_is_run_or_skipped_with_a_reason(name: str, rows: int, skipped: int) -> None:
    found = read(FACTS / name)
    assert len(found) == rows
    assert [row.line for row in found] == list(range(2, rows + 2))
    assert sum(isinstance(row, Skipped) for row in found) == skipped
    assert all(row.reason for row in found if isinstance(row, Skipped))
