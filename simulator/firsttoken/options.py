"""What a run is asked for besides student and target; what is left open follows from the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from firsttoken_compiler.errors import OptionError
from firsttoken_compiler.options import Precision, WeightRule, resolve

if TYPE_CHECKING:
    from firsttoken_compiler.schedule.choice import Schedules

Progress = Callable[[str, float, float], None]
"""Called with (stage, done, total) by everything that takes long."""


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Number formats and seed; the defaults are those of the command line.

    Attributes:
        weights: "int4", "int8", "fp16", a type of blocks ("q4_k") or a mixture of them ("q4_k_m"); for weights that are
            floats, as those that a file stores quantised stay as they are.
        acts: "int8", "int16" or "fp16"; None for what goes with the weights.
        group: weights that share a scale: "32", "64", "128" or "channel".
        norm_cache: type in which normalised rows are kept, "int8", "int16" or "fp16"; "statistics", "off" (nothing is
            kept) or "auto" (the cheapest); None for what goes with the activations.
        kv_cache: "fp16" or "int8", type of the keys and values that are kept.
        kv_concat: whether keys and values of earlier rows and of this run are copied together before attention reads
            them, as graphs do that concatenate the two.
        ranges: tensors that products read with their largest magnitudes (`act_ranges.ranges_of`), for static scales of
            integer activations; empty for a scale per token.
        seed: of every random choice.
        fallback: whether the host computes what the NPU cannot; without it that is an error.
        weights_absent: whether an ONNX file may lack its external weights, which no time depends on.
        layer_bits: bits of the weights per layer (4, 8, 16; 0 for `weights`), before the bits that the student names.
        asymmetric: whether integer weights have zero points.
        rules: formats for some of the matrices, before `layer_bits` and `weights`; the first that covers one decides.
        norm_cache_place: where normalised rows that are kept lie, "scratchpad", "dram" or "auto".
        residual_spill: "fp32" or "fp16", type of those sums of the residual stream that do not fit the scratchpad.
        host_roles: what the host computes, "token_embd", "output" or both.
        host_weight_bits: bits per weight of these as they lie on the host, scales included.
        schedule: choices of kernels (`schedule.choice`), None for the compiler's own.
    """

    weights: str = "int4"
    acts: str | None = None
    group: str = "128"
    norm_cache: str | None = None
    kv_cache: str = "fp16"
    ranges: tuple[tuple[str, float], ...] = ()
    seed: int = 0
    fallback: bool = True
    weights_absent: bool = False
    layer_bits: tuple[int, ...] = ()
    asymmetric: bool = False
    rules: tuple[WeightRule, ...] = ()
    norm_cache_place: str = "auto"
    residual_spill: str = "fp32"
    host_roles: tuple[str, ...] = ()
    host_weight_bits: float = 16.0
    schedule: Schedules | None = None
    kv_concat: bool = False

    def __post_init__(self) -> None:
        """Raises OptionError for a combination that does not exist."""
        object.__setattr__(self, "layer_bits", tuple(self.layer_bits))
        object.__setattr__(self, "rules", tuple(self.rules))
        object.__setattr__(self, "ranges", tuple(self.ranges))
        object.__setattr__(self, "host_roles", tuple(self.host_roles))
        self.precision()

    def precision(self, student_bits: tuple[int, ...] = ()) -> Precision:
        """What the compiler is told; `student_bits` are a student's own bits per layer, 0 for no wish."""
        if student_bits and len(self.layer_bits) > len(student_bits):
            raise OptionError(
                f"layer_bits has {len(self.layer_bits)} entries, the student has {len(student_bits)} layers; "
                "give one per layer"
            )
        asked = self.layer_bits + (0,) * (len(student_bits) - len(self.layer_bits))
        bits = tuple(a or b for a, b in zip(asked, student_bits, strict=True)) if student_bits else asked
        chosen = resolve(
            self.weights, self.acts, self.group, self.norm_cache, asymmetric=self.asymmetric, rules=self.rules
        )
        return replace(
            chosen, layer_bits=bits if any(bits) else (), kv_cache=self.kv_cache, ranges=self.ranges,
            norm_cache_place=self.norm_cache_place, residual_spill=self.residual_spill,
            host_roles=self.host_roles, host_weight_bits=self.host_weight_bits,
            kv_concat=self.kv_concat,
        )  # fmt: skip

    def meta(self) -> dict[str, Any]:
        """What a program records of the options."""
        chosen = self.precision()
        return {
            "weights": chosen.weights,
            "activations": chosen.acts,
            "group": chosen.group,
            "norm_cache": chosen.norm_cache,
            "norm_cache_place": chosen.norm_cache_place,
            "residual_spill": chosen.residual_spill,
            "kv_cache": chosen.kv_cache,
            "acts_range": "static" if chosen.ranges else "dynamic",
            "seed": self.seed,
            **({"mix": [rule.text() for rule in self.rules]} if self.rules else {}),
            **({"host_roles": list(self.host_roles)} if self.host_roles else {}),
            **({"kv_concat": True} if self.kv_concat else {}),
        }
