"""The weights of one graph: initialisers that stay in their file, and the nodes that make matrices of them.

A matrix that lies output width first, as in a GGUF file, is transposed in the graph; one in blocks passes through
`DequantizeBlocks` of the domain "firsttoken" (blocks uint8 [N, bytes of a row] -> float32 [N, K]); rows that lie in
pairs for llama.cpp's rotary positions are put back into halves.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from firsttoken_compiler.formats.types import BLOCK_TYPES
from firsttoken_models.weights import EMBEDDING, WEIGHTS_FILE, Slot, layout

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx

    from firsttoken.encoder import EncoderConfig
    from firsttoken.student import Place, StudentConfig, WeightStore

DOMAIN: Final = "firsttoken"
ELEMENTS: Final = {"f32": (1, 4), "f16": (10, 2), "bf16": (16, 2)}
"""ONNX's element type and bytes of a float."""
FLOAT, UINT8 = 1, 2


class GraphWeights:
    """Adds weights to a graph under construction; every tensor is added once."""

    def __init__(
        self, config: StudentConfig | EncoderConfig, store: WeightStore | None, op: Callable[..., str]
    ) -> None:
        """`op` appends a node (name, inputs, **attributes) and returns its result. Without `store` no file exists."""
        self.config, self.store, self._op = config, store, op
        self.location = store.path.name if store else WEIGHTS_FILE
        self.slots = layout(config)
        self.initializers: list[onnx.TensorProto] = []
        self._made: dict[str, str] = {}

    def vector(self, name: str, node: str) -> str:
        """Return a norm's factors or a bias as float32."""
        slot, place = self.slots[name], self._place(name)
        value = self._external(name, place, ELEMENTS[place.type][0], slot.shape)
        node = f"{node}/{name.rpartition('.')[2]}"
        if place.heads:
            value = self._in_halves(value, node, place.heads, slot.shape)
        return self._as_float(value, node, place)

    def matrix(self, name: str, node: str) -> str:
        """Return a weight as [K, N], the second operand of a product."""
        place = self._place(name)
        if not place.rows_first:
            return self._external(name, place, FLOAT, self.slots[name].shape)
        return self._op(f"{node}/Transpose", [self._rows(name, node, place)], perm=[1, 0])

    def table(self, node: str, name: str = EMBEDDING) -> str:
        """Return a table that rows are gathered from: by default the embedding table [vocab, hidden]."""
        return self._rows(name, node, self._place(name))

    def _rows(self, name: str, node: str, place: Place) -> str:
        """A matrix as it lies, [N, K] float32."""
        if name in self._made:
            return self._made[name]
        shape = self.slots[name].shape
        shape = shape[::-1] if place.rows_first else shape
        blocks = BLOCK_TYPES.get(place.type)
        lies = shape if blocks is None else (shape[0], blocks.row_bytes(shape[1]))
        value = self._external(name, place, UINT8 if blocks is not None else ELEMENTS[place.type][0], lies)
        if place.heads:
            value = self._in_halves(value, node, place.heads, lies)
        if blocks is not None:
            value = self._op(
                f"{node}/DequantizeBlocks", [value], domain=DOMAIN, type=blocks.name, k=shape[1]
            )  # fmt: skip
        self._made[name] = self._as_float(value, node, place)
        return self._made[name]

    def _as_float(self, value: str, node: str, place: Place) -> str:
        narrow = place.type in ("f16", "bf16")
        return self._op(f"{node}/Cast", [value], to=FLOAT) if narrow else value

    def _in_halves(self, value: str, node: str, heads: int, shape: tuple[int, ...]) -> str:
        """Rows [heads, d / 2, 2, ...] as [heads, 2, d / 2, ...]."""
        pairs = (heads, shape[0] // heads // 2, 2, *shape[1:])
        apart = self._op(f"{node}/pairs/Reshape", [value, self.numbers(pairs)])
        turned = self._op(f"{node}/pairs/Transpose", [apart], perm=[0, 2, 1, *range(3, len(pairs))])
        return self._op(f"{node}/halves/Reshape", [turned, self.numbers(shape)])

    def numbers(self, values: tuple[int, ...]) -> str:
        """Return a constant shape."""
        import numpy as np
        from onnx import numpy_helper

        name = f"model.shape.{'x'.join(map(str, values))}"
        if name not in self._made:
            self._made[name] = name
            self.initializers.append(numpy_helper.from_array(np.array(values, np.int64), name))
        return name

    def _external(self, name: str, place: Place, element: int, shape: tuple[int, ...]) -> str:
        """Append an initializer whose data lies in the weights' file and return its name."""
        import onnx

        tensor = onnx.TensorProto(name=name, data_type=element, dims=shape)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", self.location), ("offset", place.offset), ("length", place.length)):
            tensor.external_data.add(key=key, value=str(value))
        self.initializers.append(tensor)
        return name

    def _place(self, name: str) -> Place:
        """Where the tensor lies; raises ValueError where the weights have none, or one of other dimensions."""
        from firsttoken.student import Place

        slot = self.slots[name]
        if self.store is None:
            return Place(slot.offset, slot.length)
        try:
            place = self.store.place(name)
        except KeyError:
            raise ValueError(
                f"student {self.config.name!r}: weights {self.store.path} have no tensor {name}; "
                "use the weights written for these dimensions"
            ) from None
        needed = stored_bytes(slot, place)
        if place.length != needed:
            raise ValueError(
                f"student {self.config.name!r}: tensor {name} is {place.length} bytes in {self.store.path}, its shape "
                f"{list(slot.shape)} needs {needed}; use the weights written for these dimensions"
            )
        return place


def stored_bytes(slot: Slot, place: Place) -> int:
    """Bytes of a tensor in the type that its place says; 0 where its rows are no whole blocks."""
    elements = math.prod(slot.shape)
    if place.type in ELEMENTS:
        return elements * ELEMENTS[place.type][1]
    blocks = BLOCK_TYPES[place.type]
    return elements // blocks.block * blocks.nbytes
