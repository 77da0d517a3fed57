"""Attention and rotary embedding: ONNX's own operators, and the decomposed spellings of torch's exporter."""

import math
from typing import Any

import numpy as np

from firsttoken_compiler.passes import views
from firsttoken_compiler.passes.patterns import (
    Captured,
    Context,
    Env,
    LookThrough,
    Match,
    Rule,
    calls,
    is_float,
    laid_out,
    matrix_of,
    slice_bounds,
    token_list,
)
from firsttoken_compiler.passes.views import UnsupportedView, View
from firsttoken_compiler.schedule.spec import MASKED
from firsttoken_compiler.tvm import dialect
from firsttoken_compiler.tvm.api import Call, dtype_of, is_op, relax, shape_of, wildcard

# --- rotary embedding ---------------------------------------------------------------------------------------


def _rotary(context: Context, builder: Any, view: View, cos: Any, sin: Any) -> View:
    if view.dims is not None:
        raise UnsupportedView(f"rotary embedding of a tensor {list(view.dims)}")
    tables = {shape_of(table)[-1] for table in (cos, sin)}
    whole = view.width > 0 and view.features % view.heads == 0
    if not whole or view.width % 2 or len(tables) != 1 or not tables <= {view.width // 2, view.width}:
        raise UnsupportedView(f"rotary embedding of heads of {view.width} by tables of {sorted(tables)}")
    axes = next((known for known in ("mn", "mhd") if view.is_laid_out(known)), "hmd")
    base = context.emit(builder, "npu.rope", [laid_out(view, axes), cos, sin], heads=view.heads, out="float32")
    return View(base, view.axes, view.tokens, view.features, view.heads, view.repeat)


def _half_table(context: Context, value: Any, tokens: int) -> np.ndarray | None:
    """Rows `[tokens, d/2]` of a constant table `[.., tokens, d]` whose halves repeat; None when it is not one."""
    table = context.known(value)
    if table is None or table.size % tokens or table.shape[:-2] != (1,) * (table.ndim - 2):
        return None
    table = table.reshape(-1, table.shape[-1])
    half = table.shape[-1] // 2
    if table.shape[0] not in (1, tokens) or not np.array_equal(table[:, :half], table[:, half:]):
        return None
    return np.broadcast_to(table[:, :half], (tokens, half)).astype(np.float32)


def _decomposed_rope() -> Rule:
    """X * cos + concat(-x[half:], x[:half]) * sin."""
    x, cos, sin = wildcard(), wildcard(), wildcard()
    low = is_op("relax.strided_slice")(x, varg_default_wildcard=True)
    high = is_op("relax.strided_slice")(x, varg_default_wildcard=True)
    turned = calls("concat", relax_tuple(calls("negative", low), high))
    pattern = calls("add", calls("multiply", x, cos), calls("multiply", turned, sin))

    def condition(context: Context, c: Captured) -> bool:
        shape = shape_of(c["x"])
        if len(shape) != 4 or not _turns_halves(context, c, shape[3]):
            return False
        tables = [c[part] for part in ("cos", "sin")]
        constant = all(_half_table(context, table, shape[2]) is not None for table in tables)
        return constant or all(_is_whole_table(context, table, shape) for table in tables)

    def build(context: Context, builder: Any, c: Captured, env: Env) -> View:
        view = env[c["x"]]
        tables = []
        for part in ("cos", "sin"):
            known = _half_table(context, c[part], view.tokens)
            table = context.constant(known, "rotary") if known is not None else matrix_of(builder, env[c[part]])
            tables.append(table)
        return _rotary(context, builder, view, *tables)

    captures = {"x": x, "cos": cos, "sin": sin, "low": low, "high": high, "turned": turned}
    return LookThrough(pattern, captures, build, condition)


def _is_whole_table(context: Context, value: Any, shape: tuple[int, ...]) -> bool:
    """Whether a value is a table `[.., tokens, d]` for x `[1, heads, tokens, d]` that is computed at run time."""
    own = shape_of(value)
    return context.known(value) is None and own[-2:] == shape[-2:] and math.prod(own[:-2]) == 1 and is_float(value)


def _turns_halves(context: Context, c: Captured, width: int) -> bool:
    """Whether the rotated part is the upper half of every head, negated, then the lower half."""
    bounds = [slice_bounds(context.values[c[part]]) for part in ("low", "high")]
    axis = context.values[c["turned"]].attrs.axis
    whole = int(axis if axis is not None else 0) % 4 == 3
    return whole and bounds == [(3, width // 2, width), (3, 0, width // 2)]


def relax_tuple(*fields: Any) -> Any:
    """Pattern of a tuple of patterns."""
    from tvm.relax.dpl import is_tuple

    return is_tuple(list(fields))


class RawRope(Rule):
    """npu.raw_rope: caches gathered by position, or already per token."""

    def match(self, context: Context, variable: Any, value: Any) -> Match | None:
        """Captures all arguments of the call."""
        names = ("x", "cos", "sin", "positions")
        captured = {"call": value, **dict(zip(names, value.args, strict=False))}
        return Match(captured, tuple(value.args), (variable,))

    def emit(self, context: Context, builder: Any, match: Match, env: Env) -> View:
        """Emits the gathers of the tables (once per table and positions) and the rotation."""
        c = match.captured
        view, heads = env[c["x"]], int(c["call"].attrs["heads"])
        if heads:
            view = View(view.base, view.axes, view.tokens, view.features, heads)
        cos, sin = (self._table(context, builder, c, env, part, view.tokens) for part in ("cos", "sin"))
        turned = _rotary(context, builder, view, cos, sin)
        return View(turned.base, view.axes, view.tokens, view.features, 1 if heads else view.heads)

    def _table(self, context: Context, builder: Any, c: Captured, env: Env, part: str, tokens: int) -> Any:
        if "positions" not in c:
            table = context.known(c[part])
            if table is not None:
                return context.constant(table.reshape(tokens, -1).astype(np.float32), "rotary")
            return env[c[part]].base
        positions, known = context.known(c["positions"]), context.known(c[part])
        if positions is not None and known is not None:
            return context.constant(known[positions.reshape(-1)].astype(np.float32), "rotary")
        key = (c[part], c["positions"])
        cache = context.table("gathered")
        if key not in cache:
            table = env[c[part]].base if c[part] in env else context.constant(np.asarray(known), "rotary")
            if positions is None:
                rows = token_list(builder, env[c["positions"]])
            else:
                rows = context.constant(positions.reshape(-1).astype(np.int64), "positions")
            cache[key] = context.emit(builder, "npu.gather", [table, rows], out="float32")
        return cache[key]


# --- attention ----------------------------------------------------------------------------------------------


def causal_mask(mask: np.ndarray, tokens: int) -> bool:
    """Whether a constant mask is exactly 'no key after the query' (bool: allowed; float: 0 or very negative)."""
    square = mask.reshape(-1, mask.shape[-1])
    if square.shape != (tokens, tokens):
        return False
    allowed = square if square.dtype == np.bool_ else square > -1e4
    clean = square.dtype == np.bool_ or bool(np.all(square[allowed] == 0))
    return clean and np.array_equal(allowed, np.tril(np.ones((tokens, tokens), bool)))


def emit_attention(
    context: Context, builder: Any, query: View, key: View, value: View, *, scale: float, causal: bool,
    mask: Any | None = None, past: int = 0,
) -> Any:  # fmt: skip
    """Emits attention over keys and values, which are matrices of the prompt or caches, and returns its output.

    `past`: rows of the caches before the prompt, which a causal mask lets every query see. Raises UnsupportedView for a
    target that cannot multiply fp16 by fp16, as scores and sums of values are.
    """
    context.require_pair("fp16xfp16", ", as attention does")
    args = [query.base, key.base, value.base] + ([mask] if mask is not None else [])
    return context.emit(
        builder, "npu.attention", args, heads=query.heads, kv_heads=key.heads, scale=scale, causal=int(causal),
        past=past, mask=int(mask is not None), out="float32",
    )  # fmt: skip


def emit_append(context: Context, builder: Any, view: View, past: View | None = None) -> View:
    """Emits the cache `[heads, past + tokens, width]` that keys or values become, behind those of `past`."""
    rows = past.tokens if past is not None else 0
    args = [view.base] + ([past.base] if past is not None else [])
    cache = context.emit(builder, "npu.kv_append", args, kv_heads=view.heads, past=rows, out="float32")
    return View(cache, "1hmd", rows + view.tokens, view.features, view.heads)


class RawAttention(Rule):
    """npu.raw_attention: ONNX Attention with optional mask, past and present."""

    def match(self, context: Context, variable: Any, value: Any) -> Match | None:
        """Captures the call."""
        return Match({"call": value}, tuple(a for a in value.args if isinstance(a, relax.Var)), (variable,))

    def emit(self, context: Context, builder: Any, match: Match, env: Env) -> View:
        """Emits the attention; the result is a view of the output, its presents kept for the tuple items."""
        call = match.captured["call"]
        attrs = call.attrs
        query, key, value = (env[arg] for arg in call.args[:3])
        _check_heads(query, key, value, "mn" if len(shape_of(call.args[0])) == 3 else "hmd")
        if len(shape_of(call.args[0])) == 3:
            query = View(query.base, "1mhd", query.tokens, query.features, int(attrs["heads"]))
            key, value = (View(v.base, "1mhd", v.tokens, v.features, int(attrs["kv_heads"])) for v in (key, value))
        mask, causal = None, bool(int(attrs["causal"]))
        if int(attrs["mask_at"]):
            argument = call.args[int(attrs["mask_at"])]
            known = context.known(argument)
            if known is not None and causal_mask(known, query.tokens):
                causal = True
            elif causal:
                raise UnsupportedView("attention with a mask and causality both: put the causality into the mask")
            else:
                mask = (
                    additive(context, builder, env[argument], query)
                    if known is None
                    else constant_mask(context, known, query.tokens)
                )
        past_at = int(attrs["past_at"])
        past = [env[arg] for arg in call.args[past_at : past_at + 2]] if past_at else [None, None]
        scale = float(attrs["scale"]) or float(query.width) ** -0.5
        pairs = zip((key, value), past, strict=True)
        presents = [
            view if len(shape_of(view.base)) == 3 else emit_append(context, builder, view, before)
            for view, before in pairs
        ]  # what lies in a cache already is its own present
        # Without past rows attention reads the keys and values of the prompt where they are, not their copies.
        keys, values = presents if past_at else (key, value)
        rows = past[0].tokens if past[0] is not None else 0
        output = emit_attention(context, builder, query, keys, values, scale=scale, causal=causal, mask=mask, past=rows)
        axes = "1mn" if len(shape_of(call.args[0])) == 3 else "1hmd"
        view = View(output, axes, query.tokens, query.features, 1 if axes == "1mn" else query.heads)
        context.table("presents")[view.base] = presents
        return view


def _check_heads(query: View, key: View, value: View, axes: str) -> None:
    """Raises UnsupportedView unless all three lie in memory as attention reads them, keys and values alike."""
    laid_out(query, axes)
    caches = [len(shape_of(view.base)) == 3 for view in (key, value)]
    for view, cache in zip((key, value), caches, strict=True):
        if not cache:
            laid_out(view, axes)
        elif not view.is_laid_out("hmd"):
            raise UnsupportedView(f"attention over a cache laid out as {view.axes}")
    alike = (key.heads, key.repeat, key.features) == (value.heads, value.repeat, value.features)
    if not alike or query.repeat != 1 or caches[0] != caches[1]:
        raise UnsupportedView(f"attention over keys {list(key.shape)} and values {list(value.shape)}")


class Append(Rule):
    """Concat of a cache that comes in with new rows, which the graph returns: they are appended in place."""

    def match(self, context: Context, variable: Any, value: Any) -> Match | None:
        """Captures cache and rows."""
        parts = cache_parts(context.values, value)
        if parts is None or variable not in context.returned:
            return None
        return Match({"past": parts[0], "new": parts[1]}, parts, (variable,))

    def emit(self, context: Context, builder: Any, match: Match, env: Env) -> View:
        """Emits the append; a cache without rows is what is appended to it."""
        past, new = env[match.captured["past"]], env[match.captured["new"]]
        if 0 in shape_of(match.captured["past"]):
            return new
        laid_out(new, "hmd")
        if len(shape_of(past.base)) != 3 or new.repeat != 1:
            raise UnsupportedView(f"appending {list(new.shape)} to {list(past.shape)}")
        return emit_append(context, builder, new, past)


def cache_parts(values: dict[Any, Any], value: Any) -> tuple[Any, Any] | None:
    """(cache, rows) of a concatenation `[1, heads, past + tokens, width]` to a graph input along the rows."""
    if not (isinstance(value, Call) and value.op.name == "relax.concat"):
        return None
    parts = values.get(value.args[0], value.args[0])
    axis = value.attrs.axis
    if not isinstance(parts, relax.Tuple) or len(parts.fields) != 2 or axis is None or int(axis) % 4 != 2:
        return None
    past, new = parts.fields
    variables = isinstance(past, relax.Var) and isinstance(new, relax.Var) and past not in values
    shapes = [shape_of(part) for part in (past, new)] if variables else [(), ()]
    if any(len(shape) != 4 or shape[0] != 1 for shape in shapes) or dtype_of(past)[:5] != "float":
        return None
    return past, new


def additive(context: Context, builder: Any, mask: View, query: View) -> Any:
    """A mask `[m, t]`, or `[1, t]` for all tokens, that is added to the scores of every head.

    An input of several rows is copied once, bounded as constants are: every head of every layer reads all of it, and
    values between operators may lie in the scratchpad.
    """
    if dtype_of(mask.base) != "float32":
        raise UnsupportedView(f"a {dtype_of(mask.base)} mask that is no constant: pass 0 or a very negative float32")
    base = laid_out(mask, "mn")
    if shape_of(base)[0] not in (1, query.tokens):
        raise UnsupportedView(f"a mask of shape {list(mask.shape)} for {query.tokens} tokens")
    rows, width = shape_of(base)
    if rows == 1 or context.values.get(base) is not None:
        return base
    copies = context.table("masks")
    if base not in copies:
        bounded = f"max(s0, {MASKED})"
        copies[base] = context.emit(builder, "npu.map", [base], expr=bounded, rows=rows, width=width, out="float32")
    return copies[base]


def constant_mask(context: Context, mask: np.ndarray, tokens: int) -> Any:
    """A constant mask (bool: allowed; float: added) as an operand `[tokens, keys]`; raises UnsupportedView."""
    if mask.ndim < 1 or math.prod(mask.shape[:-2]) != 1:
        raise UnsupportedView(f"a mask of shape {list(mask.shape)}: expected the same one for every head")
    added = np.where(mask, 0.0, MASKED) if mask.dtype == np.bool_ else np.maximum(mask, MASKED)
    rows = added.reshape(-1, mask.shape[-1])
    if rows.shape[0] not in (1, tokens):
        raise UnsupportedView(f"a mask of shape {list(mask.shape)} for {tokens} tokens")
    return context.constant(rows.astype(np.float32), "mask")


class TupleItem(Rule):
    """One of the three results of ONNX Attention, or of the results of the host."""

    def match(self, context: Context, variable: Any, value: Any) -> Match | None:
        """Captures the tuple and the index."""
        source = context.values.get(value.tuple_value)
        if not (isinstance(source, Call) and source.op.name in ("npu.raw_attention", "npu.raw_host")):
            return None
        return Match({"tuple": value.tuple_value, "index": int(value.index)}, (value.tuple_value,), (variable,))

    def emit(self, context: Context, builder: Any, match: Match, env: Env) -> View:
        """The output's view, or a cache; of the host a row-major tensor."""
        view = env[match.captured["tuple"]]
        index = match.captured["index"]
        source = context.values[match.captured["tuple"]]
        if source.op.name == "npu.raw_host":
            shape = dialect.decode_results(str(source.attrs["results"]))[index][0]
            return views.dense(builder.emit(relax.TupleGetItem(view.base, index)), shape)
        if index == 0:
            return view
        present: View = context.table("presents")[view.base][index - 1]
        return present


def _scores(query: Any, key: Any, scale: Any, scale_k: Any, mask: Any, form: str, masked: bool) -> Any:
    if form == "both":  # SDPA scales queries and keys by the root of the scale
        scores = calls("matmul", calls("multiply", query, scale), calls("multiply", key, scale_k))
    else:
        scores = calls("matmul", query, key)
        if form == "multiply":
            scores = calls("multiply", scores, scale)
        elif form == "divide":
            scores = calls("divide", scores, scale)
    return calls("add", scores, mask) if masked else scores


def _decomposed_attention(form: str, masked: bool, guarded: bool) -> Rule:
    """matmul(softmax(scores [+ mask]), v) with the spelling's way of scaling, with or without SDPA's NaN guard."""
    query, key, value, scale, scale_k, mask, zero = (wildcard() for _ in range(7))
    softmax = calls("nn.softmax", _scores(query, key, scale, scale_k, mask, form, masked))
    weights = calls("where", calls("isnan", softmax), zero, softmax) if guarded else softmax
    captures = {"q": query, "k": key, "v": value, "weights": softmax}
    if form != "none":
        captures["scale"] = scale
    if form == "both":
        captures["scale_k"] = scale_k
    if masked:
        captures["mask"] = mask

    def condition(context: Context, c: Captured) -> bool:
        shape = shape_of(c["q"])
        if len(shape) != 4 or any(context.scalar(c[name]) is None for name in ("scale", "scale_k") if name in c):
            return False
        return int(context.values[c["weights"]].attrs.axis) in (-1, 3)

    def build(context: Context, builder: Any, c: Captured, env: Env) -> View:
        query_, key_, value_ = env[c["q"]], views.permute(env[c["k"]], [0, 1, 3, 2]), env[c["v"]]
        factor = context.scalar(c["scale"]) if "scale" in c else 1.0
        assert factor is not None
        if form == "both":
            factor *= context.scalar(c["scale_k"]) or 1.0
        elif form == "divide":
            factor = 1.0 / factor
        known = context.known(c["mask"]) if "mask" in c else None
        causal = known is not None and causal_mask(known, query_.tokens)
        mask_ = None
        if "mask" in c and not causal:
            mask_ = (
                additive(context, builder, env[c["mask"]], query_)
                if known is None
                else constant_mask(context, known, query_.tokens)
            )
        _check_heads(query_, key_, value_, "hmd")
        output = emit_attention(context, builder, query_, key_, value_, scale=factor, causal=causal, mask=mask_)
        return View(output, "1hmd", query_.tokens, query_.features, query_.heads)

    return LookThrough(calls("matmul", weights, value), captures, build, condition)


def attention_rules() -> list[Rule]:
    """Every decomposed spelling, guarded and masked ones first."""
    return [
        _decomposed_attention(form, masked, guarded)
        for guarded in (True, False)
        for masked in (True, False)
        for form in ("both", "multiply", "divide", "none")
    ]


ROPE = _decomposed_rope()
RAW_ROPE = RawRope()
RAW_ATTENTION = RawAttention()
APPEND = Append()
TUPLE_ITEM = TupleItem()
