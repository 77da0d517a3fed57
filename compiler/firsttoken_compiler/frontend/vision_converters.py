"""Convolutions, pools and batch normalisations of ONNX as raw npu calls, with their padding resolved.

Signatures are those of `converters`. A StudentError says why a node is none of the NPU's; it then runs on the host.
"""

from collections.abc import Callable
from typing import Any, Final

from firsttoken_compiler.frontend.conversion import refused
from firsttoken_compiler.tvm import dialect
from firsttoken_compiler.tvm.api import relax, shape_of


def conv(builder: Any, inputs: Any, attrs: dict[str, Any], _params: Any) -> Any:
    """Conv over one or two axes."""
    x, weight = inputs[0], inputs[1]
    kernel = shape_of(weight)[2:]
    extra = _missing_axes(x, attrs, "Conv")
    geometry = _geometry(shape_of(x)[2:], kernel, attrs)
    bias = [inputs[2]] if len(inputs) > 2 and inputs[2] is not None else []
    image = builder.emit(relax.op.expand_dims(x, 2)) if extra else x
    made = dialect.call("npu.raw_conv", [image, weight, *bias], group=int(attrs.get("group", 1)), **geometry)
    return relax.op.squeeze(builder.emit(made), [2]) if extra else made


def _pool(mode: str) -> Callable[..., Any]:
    def pool(builder: Any, inputs: Any, attrs: dict[str, Any], _params: Any) -> Any:
        """MaxPool and AveragePool over one or two axes."""
        x = inputs[0]
        if int(attrs["tvm_custom"].get("num_outputs", 1)) > 1:
            raise refused(attrs, "MaxPool with indices")
        extra = _missing_axes(x, attrs, "pool")
        geometry = _geometry(shape_of(x)[2:], tuple(attrs["kernel_shape"]), attrs)
        image = builder.emit(relax.op.expand_dims(x, 2)) if extra else x
        counted = int(attrs.get("count_include_pad", 0))
        made = dialect.call("npu.raw_pool", [image], mode=mode, count_include_pad=counted, **geometry)
        return relax.op.squeeze(builder.emit(made), [2]) if extra else made

    return pool


def batch_normalization(_builder: Any, inputs: Any, attrs: dict[str, Any], _params: Any) -> Any:
    """BatchNormalization as inference has it: statistics are given."""
    if int(attrs.get("training_mode", 0)) or int(attrs["tvm_custom"].get("num_outputs", 1)) > 1:
        raise refused(attrs, "BatchNormalization in training mode")
    if int(attrs.get("spatial", 1)) != 1:
        raise refused(attrs, "BatchNormalization with a statistic per pixel")
    return dialect.call("npu.raw_batch_norm", list(inputs)[:5], eps=float(attrs.get("epsilon", 1e-5)))


def _missing_axes(x: Any, attrs: dict[str, Any], what: str) -> int:
    """Axes that a signal lacks to be an image: 0 or 1; raises StudentError for volumes."""
    spatial = len(shape_of(x)) - 2
    if spatial not in (1, 2):
        raise refused(attrs, f"{what} over {spatial} axes")
    return 2 - spatial


def _geometry(extents: tuple[int, ...], kernel: tuple[int, ...], attrs: dict[str, Any]) -> dict[str, int]:
    """Kernel, stride, dilation, padding before, and size of the result, along y and x."""
    rank = len(extents)
    stride = [int(s) for s in attrs.get("strides") or (1,) * rank]
    dilation = [int(d) for d in attrs.get("dilations") or (1,) * rank]
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    auto = attrs.get("auto_pad", "NOTSET")
    auto = auto.decode() if isinstance(auto, bytes) else str(auto)
    before, after = _padding(auto, extents, reach, stride, attrs)
    rest = [n + b + a - r for n, b, a, r in zip(extents, before, after, reach, strict=True)]
    if min(rest) < 0:
        raise refused(attrs, f"a kernel of {kernel} is larger than {extents}, padded")
    out = [r // s + 1 for r, s in zip(rest, stride, strict=True)]
    if int(attrs.get("ceil_mode", 0)):  # a last window that starts in the padding behind does not count
        up = [-(-r // s) + 1 for r, s in zip(rest, stride, strict=True)]
        inside = [(u - 1) * s < n + b for u, s, n, b in zip(up, stride, extents, before, strict=True)]
        out = [u if ok else o for u, o, ok in zip(up, out, inside, strict=True)]
    given = {"kernel": (kernel, 1), "stride": (stride, 1), "dilation": (dilation, 1), "pad": (before, 0),
             "after": (after, 0), "out": (out, 1)}  # fmt: skip
    pairs = {name: (*(neutral,) * (2 - rank), *values) for name, (values, neutral) in given.items()}
    return {f"{name}_{axis}": int(pair[i]) for name, pair in pairs.items() for i, axis in enumerate("yx")}


def _padding(
    auto: str, extents: tuple[int, ...], reach: list[int], stride: list[int], attrs: dict[str, Any]
) -> tuple[list[int], list[int]]:
    """Padding before and behind each axis."""
    rank = len(extents)
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        steps = [(-(-n // s) - 1) * s for n, s in zip(extents, stride, strict=True)]
        total = [max(0, t + r - n) for t, r, n in zip(steps, reach, extents, strict=True)]
        small, large = [t // 2 for t in total], [t - t // 2 for t in total]
        return (small, large) if auto == "SAME_UPPER" else (large, small)
    pads = [int(p) for p in attrs.get("pads") or (0,) * (2 * rank)] if auto != "VALID" else [0] * (2 * rank)
    if min(pads) < 0:
        raise refused(attrs, f"negative padding {pads}")
    return pads[:rank], pads[rank:]


CONVERTERS: Final[dict[str, Callable[..., Any]]] = {
    "AveragePool": _pool("average"), "BatchNormalization": batch_normalization, "Conv": conv, "MaxPool": _pool("max"),
}  # fmt: skip
