"""A sound GGUF file with bytes changed, put in or taken away is refused, or is a student all the same."""

import contextlib
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
import gguf_making

from firsttoken import api
from firsttoken.subject import Built, subject_of
from firsttoken_compiler.errors import FirsttokenError

WHOLE = gguf_making.small().encode()
HEADER = WHOLE.index(b"blk.0.ffn_norm") + 60
"""Bytes that say something; zeros follow."""
BYTES = st.one_of(st.sampled_from([0, 1, 2, 8, 31, 32, 64, 127, 128, 255]), st.integers(0, 255))
CHANGES = st.lists(st.tuples(st.sampled_from("=+-"), st.integers(0, HEADER), BYTES), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gguf")


def test_the_file_itself_is_sound(folder: Path) -> None:
    path = folder / "sound.gguf"
    path.write_bytes(WHOLE)
    program = api.compile(path, "systolic-128", prompt=3)
    assert len(api.simulate(program, "systolic-128").start_fs) == len(program)


@given(changes=CHANGES, end=st.one_of(st.none(), st.integers(0, len(WHOLE))))
def test_damaged_files_are_refused_or_read(folder: Path, changes: list[tuple[str, int, int]], end: int | None) -> None:
    data = bytearray(WHOLE)
    for what, at, value in changes:
        if what == "=":
            data[at] = value
        elif what == "+":
            data.insert(at, value)
        else:
            del data[at]
    path = folder / "damaged.gguf"
    path.write_bytes(data[:end])
    with contextlib.suppress(FirsttokenError):
        subject = subject_of(path)
        assert isinstance(subject, Built)
        subject.open(*subject.lengths(2, None))
