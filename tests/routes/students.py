"""Tiny random students in torch, and the calls of them that exporters trace."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

PROMPT: Final = 16
PAST: Final = 16
VOCABULARY: Final = 256
SHAPE: Final[dict[str, Any]] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
SMALL: Final = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64, "vocab_size": 96}
"""For models that are committed as fixtures."""
SMOLLM2: Final = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152, "rope_theta": 1e5,
}  # fmt: skip
"""The shape of SmolLM2-135M, for what depends on size."""
SIZES: Final[dict[str, dict[str, Any]]] = {"tiny": {}, "smollm2": SMOLLM2}
# The two families differ as the real students do: Llama ties its embedding table, Qwen2 has its own head and biases.
FAMILIES: Final[dict[str, tuple[Any, Any, dict[str, Any]]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": 6, "rms_norm_eps": 1e-5}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": False, "rms_norm_eps": 1e-6}),
}
DTYPES: Final = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def randomise(model: torch.nn.Module) -> None:
    """Random weights; norm weights and biases too, so that no mistake in them hides behind 1 or 0."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
            if "norm" in name.lower() and name.endswith("weight") and parameter.ndim == 1:
                parameter.copy_(1.0 + 0.1 * noise)
            else:
                parameter.copy_(noise * (0.1 if parameter.ndim == 1 else fan_in**-0.5))


def random_model(family: str, attention: str = "eager", dtype: str = "fp32", **options: Any) -> Any:
    """A causal language model of that family."""
    model_class, config_class, own = FAMILIES[family]
    config = config_class(**{**SHAPE, **own, **options}, attn_implementation=attention)
    torch.manual_seed(7)
    model = model_class(config).eval().to(torch.float32)
    randomise(model)
    return model.to(DTYPES[dtype]).eval()


@dataclass(frozen=True)
class Form:
    """Which inputs and outputs an export has."""

    mask: bool = False
    additive: bool = False
    """Whether the mask is the finished one `[1, 1, tokens, tokens]` that is added to the scores."""
    positions: bool = False
    cache: bool = False
    """Whether the present keys and values are outputs."""
    past: bool = False


FORMS: Final = {
    "plain": Form(),
    "mask": Form(mask=True),
    "additive": Form(mask=True, additive=True),
    "positions": Form(mask=True, positions=True),
    "kv": Form(mask=True, cache=True),
    "decode": Form(mask=True, cache=True, past=True),
}


def cache_of(pairs: list[tuple[torch.Tensor, torch.Tensor]] | None) -> Any:
    """A cache with these keys and values per layer, however this version of transformers makes one."""
    if pairs is None:
        return DynamicCache()
    if hasattr(DynamicCache, "from_legacy_cache"):
        return DynamicCache.from_legacy_cache(tuple(pairs))
    return DynamicCache(pairs)


def rows_of(cache: Any) -> list[torch.Tensor]:
    """Keys and values of every layer in turn."""
    if hasattr(cache, "layers"):
        return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return [tensor for pair in zip(cache.key_cache, cache.value_cache, strict=True) for tensor in pair]


class Student(torch.nn.Module):
    """A language model with flat inputs (ids, mask, positions, then keys and values by layer) and flat outputs."""

    def __init__(self, model: Any, form: Form) -> None:
        super().__init__()
        self.model, self.form = model, form

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None, past: list[torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        pairs = None if past is None else [(past[i], past[i + 1]) for i in range(0, len(past), 2)]
        cache = cache_of(pairs) if self.form.cache else None
        options = {} if position_ids is None else {"position_ids": position_ids}
        result = self.model(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=self.form.cache,
            **options,
        )  # fmt: skip
        if not self.form.cache:
            return (result.logits,)
        return (result.logits, *rows_of(result.past_key_values))


def example(model: Any, form: Form) -> dict[str, Any]:
    """Inputs by name; the past keys and values are a list."""
    config = model.config
    tokens = 1 if form.past else PROMPT
    rows = PAST if form.past else 0
    ids = torch.arange(tokens, dtype=torch.int64)[None] * 37 % (config.vocab_size - 3) + 3
    inputs: dict[str, Any] = {"input_ids": ids}
    if form.mask:
        mask = torch.ones(1, rows + tokens, dtype=torch.int64)
        if not form.past:
            mask[:, -2:] = 0  # padding behind the prompt, which only the padding itself may see
        if form.additive:
            allowed = torch.ones(tokens, tokens).tril() * mask
            inputs["attention_mask"] = torch.where(allowed.bool(), 0.0, -1e9)[None, None]
        else:
            inputs["attention_mask"] = mask
    if form.positions:
        inputs["position_ids"] = torch.arange(rows, rows + tokens, dtype=torch.int64)[None]
    if form.past:
        generator = torch.Generator().manual_seed(13)
        width = config.hidden_size // config.num_attention_heads
        shape = (1, config.num_key_value_heads, rows, width)
        dtype = next(model.parameters()).dtype
        count = 2 * config.num_hidden_layers
        inputs["past"] = [torch.randn(shape, generator=generator).to(dtype) for _ in range(count)]
    return inputs


def names(model: Any, form: Form) -> tuple[list[str], list[str]]:
    """ONNX names of inputs and outputs, as optimum gives them."""
    inputs = ["input_ids"] + ["attention_mask"] * form.mask + ["position_ids"] * form.positions
    pairs = [f"{i}.{part}" for i in range(model.config.num_hidden_layers) for part in ("key", "value")]
    outputs = ["logits"] + [f"present.{pair}" for pair in pairs] * form.cache
    return inputs + [f"past_key_values.{pair}" for pair in pairs] * form.past, outputs


def flat(inputs: dict[str, Any]) -> list[torch.Tensor]:
    """Tensors in the order of the ONNX inputs."""
    return [t for value in inputs.values() for t in (value if isinstance(value, list) else [value])]
