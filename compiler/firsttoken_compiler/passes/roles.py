"""What each weight of a decoder does, and in which layer: read off the canonical module, whatever its name.

Queries, keys and values are the products that an attention's operands come from; the product that reads its result is
`attn_output`. What SwiGLU, or a function between two products, reads are `ffn_gate` and `ffn_up`; the product of its
result is `ffn_down`. `output` gives the graph's logits; `token_embd` is the table with as many rows, some of which are
gathered. A table that is both is `output`. Layers are counted by the attentions behind a value.

A product that does several of these has the last of attn_q, attn_k, attn_v, or is ffn_gate. In a graph that is no
decoder (no logits as wide as a gathered table is long, or attention that looks ahead) every role is `other`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Final

from firsttoken_compiler.errors import StudentError
from firsttoken_compiler.passes.canonicalise import Canonical
from firsttoken_compiler.tvm.api import Call, bindings_of, items, operator_name, relax, shape_of

OTHER: Final = "other"
PRODUCTS: Final = frozenset(("npu.linear", "npu.conv"))
ROWS: Final = frozenset(("relax.reshape", "npu.row", "npu.columns", "npu.transpose", "npu.quantise", "npu.map"))
"""What may stand between a product and the next one: cuts, functions, other types."""
HEADS: Final = ROWS | {"npu.rope", "npu.kv_append", "npu.rms_norm", "npu.layer_norm"}
"""What may stand between a product and an attention that reads it: also caches, rotation and norms of heads."""


@dataclass(frozen=True, slots=True)
class Place:
    """What a weight does."""

    role: str = OTHER
    """One of `formats.policy.ROLES`."""
    layer: int | None = None
    """None outside the layers."""


@dataclass(frozen=True)
class Roles:
    """Places of weights by the names of their parameters."""

    layers: int = 0
    """Layers of a decoder; 0 for other graphs."""
    places: dict[str, Place] = field(default_factory=dict)

    def of(self, parameter: str) -> Place:
        """The place of a weight."""
        return self.places.get(parameter, Place())


def roles_of(canonical: Canonical) -> Roles:
    """The roles of all products' weights and of the token table."""
    return _Graph(canonical).roles()


def nodes_of(canonical: Canonical, roles: Collection[str]) -> dict[str, str]:
    """ONNX nodes that gather rows of the token table (`token_embd`) or make the logits (`output`), each with its role.

    Raises StudentError for a graph that has none of a role.
    """
    graph = _Graph(canonical)
    return {node: role for role in roles for node in graph.nodes(role)}


class _Graph:
    """The module's calls, and how many attentions lie behind each value."""

    def __init__(self, canonical: Canonical) -> None:
        function, self.known = canonical.module["main"], canonical.nodes
        bindings = bindings_of(function)
        self.results = list(getattr(bindings[-1].value, "fields", ()))
        self.calls: dict[Any, Any] = {}
        self.behind: dict[Any, int] = {}
        for binding in bindings:
            value = binding.value
            if isinstance(value, relax.TupleGetItem):
                self.calls[binding.var] = self.calls[value.tuple_value]
                self.behind[binding.var] = self.behind[value.tuple_value]
            elif isinstance(value, Call):
                before = max((self.behind.get(argument, 0) for argument in items(value.args)), default=0)
                self.calls[binding.var] = value
                self.behind[binding.var] = before + (operator_name(value) == "npu.attention")
        self.places: dict[str, Place] = {}

    def roles(self) -> Roles:
        """See `roles_of`."""
        attentions = self._all("npu.attention")
        head = self._head()
        if head is None or not attentions or not all(self._looks_back(self.calls[a]) for a in attentions):
            return Roles()
        self._place(head, "output", None)
        for attention in attentions:
            for role, operand in zip(("attn_q", "attn_k", "attn_v"), self.calls[attention].args, strict=False):
                for product in self._behind(operand, HEADS):
                    self.places[self._weight(product)] = Place(role, self.behind[attention] - 1)
        for product in self._all("npu.linear"):
            self._after_attention(product)
        self._feed_forward()
        vocabulary = int(self.calls[head].attrs["n"])
        for gather in self._tables(vocabulary):
            self.places.setdefault(str(self.calls[gather].args[0].name), Place("token_embd"))
        return Roles(max(self.behind[attention] for attention in attentions), self.places)

    def nodes(self, role: str) -> tuple[str, ...]:
        """See `nodes_of`."""
        head = self._head()
        if head is None:
            raise StudentError(
                f"--host-roles {role}: the graph returns no product as wide as a table of which it gathers rows is "
                "long; leave the option out"
            )
        places = [head] if role == "output" else self._tables(int(self.calls[head].attrs["n"]))
        return tuple(node for place in places for node in self.known.get(str(place.name), ()))

    def _tables(self, vocabulary: int) -> list[Any]:
        """Gathers of rows of the token table."""
        return [value for value in self._all("npu.gather") if vocabulary in shape_of(self.calls[value].args[0])]

    def _all(self, name: str) -> list[Any]:
        return [value for value, call in self.calls.items() if operator_name(call) == name]

    def _weight(self, product: Any) -> str:
        return str(self.calls[product].args[1].name)

    def _place(self, product: Any, role: str, layer: int | None) -> None:
        """The first place of a weight is its place."""
        self.places.setdefault(self._weight(product), Place(role, layer))

    def _head(self) -> Any | None:
        """The product that the graph returns, where it is as wide as a gathered table is long."""
        tables = {extent for gather in self._all("npu.gather") for extent in shape_of(self.calls[gather].args[0])}
        found = [product for result in self.results for product in self._behind(result, ROWS)]
        return next((p for p in found if int(self.calls[p].attrs["n"]) in tables), None)

    def _looks_back(self, call: Any) -> bool:
        """Whether queries see what came before them alone: by rule, by a cache, or by a mask with a row for each."""
        if int(call.attrs["causal"]) or len(shape_of(call.args[1])) == 3:
            return True
        return len(call.args) > 3 and shape_of(call.args[3])[0] == shape_of(call.args[0])[0]

    def _behind(self, value: Any, through: frozenset[str], kinds: frozenset[str] = PRODUCTS) -> list[Any]:
        """The nearest calls of these kinds behind a value, through these operators only; the first operand's first."""
        found, waiting, seen = [], [value], set()
        while waiting:
            value = waiting.pop()
            call = self.calls.get(value)
            if call is None or value in seen:
                continue
            seen.add(value)
            if operator_name(call) in kinds:
                found.append(value)
            elif operator_name(call) in through:
                waiting += [argument for argument in reversed(call.args) if isinstance(argument, relax.Var)]
        return found

    def _after_attention(self, product: Any) -> None:
        found = self._behind(self.calls[product].args[0], ROWS, frozenset(("npu.attention",)))
        if found:
            self._place(product, "attn_output", self.behind[found[0]] - 1)

    def _feed_forward(self) -> None:
        """Products of what a function makes of other products."""
        between = ROWS - {"npu.map"}
        downs = {}
        for product in self._all("npu.linear"):
            made = self._behind(self.calls[product].args[0], between, frozenset(("npu.swiglu", "npu.map")))
            operands = [operand for value in made for operand in self.calls[value].args]
            sources = [p for operand in operands for p in self._behind(operand, ROWS)]
            if sources and self._weight(product) not in self.places:
                downs[product] = sources
        # Where the first layer's feed-forward has no attention behind it, both read the same norm.
        first = min((self.behind[product] for product in downs), default=0)
        for product, sources in downs.items():
            layer = self.behind[product] - min(first, 1)
            self._place(product, "ffn_down", layer)
            for index, source in enumerate(dict.fromkeys(sources)):
                self._place(source, "ffn_gate" if index == 0 and len(sources) > 1 else "ffn_up", layer)
