"""The table of block types: planes add up to the blocks' bytes."""

import pytest

from firsttoken_compiler.formats.types import BLOCK_TYPES, BlockType


@pytest.mark.parametrize("kind", BLOCK_TYPES.values(), ids=BLOCK_TYPES)
def test_planes_are_the_bits_of_a_block(kind: BlockType) -> None:
    assert sum(plane.bits * kind.block // plane.per for plane in kind.planes) == 8 * kind.nbytes
    assert kind.block % kind.group == 0


@pytest.mark.parametrize("kind", BLOCK_TYPES.values(), ids=BLOCK_TYPES)
def test_numbers_and_sizes_are_those_of_gguf(kind: BlockType) -> None:
    gguf = pytest.importorskip("gguf")
    number = gguf.GGMLQuantizationType[kind.name.upper()]
    assert kind.ggml == int(number)
    assert gguf.GGML_QUANT_SIZES[number] == (kind.block, kind.nbytes)
