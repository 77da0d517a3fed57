"""Targets and students as plain documents, for `targets show` and `students show`."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Final

from firsttoken.image_network import ImageNetworkConfig
from firsttoken.student import StudentConfig, find_any, providers
from firsttoken_compiler.errors import FirsttokenError
from firsttoken_compiler.target.load import load_target

_UNITS: Final = (
    ("macs_per_cycle", "MAC/cycle"), ("bytes_per_cycle", "B/cycle"), ("bytes_per_s", "B/s"), ("pj_per_byte", "pJ/B"),
    ("pj_per_bit", "pJ/bit"), ("_pj", "pJ"), ("_ns", "ns"), ("_us", "us"), ("_hz", "Hz"), ("_mtps", "MT/s"),
    ("_cycles", "cycles"), ("vector.cycles", "cycles"), ("bytes", "B"), ("_bits", "bit"), ("flops", "FLOP/s"),
    ("_w", "W"), ("outstanding", "requests"), ("queue_depth", "requests"),
)  # fmt: skip


def unit_of(path: str) -> str:
    """The unit of a target's value, read from its name; empty for words and plain counts."""
    parts = path.split(".")
    name = ".".join(parts[:2])
    return next((unit for suffix, unit in _UNITS if name.endswith(suffix)), "")


def target_document(name: str) -> dict[str, Any]:
    """Every value of a target with unit, grade and source, and the bounds of an energy (None where it has none).

    Raises TargetError for an unknown or malformed one.
    """
    target = load_target(name)
    rows = []
    for path, provenance in target.provenance.items():
        low, high = target.bounds.get(path, (None, None))
        rows.append(
            {
                "path": path,
                "value": target.value(path),
                "low": low,
                "high": high,
                "unit": unit_of(path),
                "grade": provenance.grade,
                "source": provenance.source,
            }
        )
    return {
        "name": target.name,
        "description": target.description,
        "hash": target.content_hash,
        "values": rows,
        "not_modelled": list(target.not_modelled),
    }


def student_rows() -> list[dict[str, Any]]:
    """Every student of every provider, in their order."""
    configs = [provider.config(name) for provider in providers() for name in provider.names()]
    return [
        {
            "name": config.name,
            "family": config.family,
            "layers": config.layers,
            "hidden": config.hidden,
            "parameters": config.parameters,
            "source": config.source,
        }
        for config in configs
    ]


def student_document(name: str) -> dict[str, Any]:
    """Dimensions of one student; raises UnknownStudent with the nearest names."""
    provider, config = find_any(name)
    document = asdict(config)
    document["parameters"] = config.parameters
    if isinstance(config, ImageNetworkConfig):
        document["layers"] = config.layers
    if isinstance(config, StudentConfig):
        if not config.per_layer:
            document.pop("per_layer")
        document["rope_scaling"] = "none" if config.rope_scaling is None else str(config.rope_scaling)
        document["kv_bytes_per_token_fp16"] = config.kv_bytes_per_token()
    document["weights"] = _presence(provider.weights, config.name)
    document["tokenizer"] = _presence(provider.tokenizer, config.name)
    return document


def _presence(find: Callable[[str], object | None], name: str) -> str:
    """Whether a student has it here: "yes", "no", or why not."""
    try:
        return "no" if find(name) is None else "yes"
    except FirsttokenError as error:
        return f"no: {error}"
