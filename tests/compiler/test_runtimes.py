from importlib import resources

import pytest

from firsttoken_compiler.errors import TargetError
from firsttoken_compiler.target.load import parse_target
from firsttoken_compiler.target.target import DEFAULT_RUNTIME, Runtime, Target

GRADED = 'grade = "assumed", source = "a test"'
TABLES = f"""
[runtimes.chunks]
launch_us = {{ value = 500.0, {GRADED} }}
chunk_tokens = {{ value = 128, {GRADED} }}
context_buckets = {{ value = [512, 1024], {GRADED} }}
host_roles = {{ value = ["output"], {GRADED} }}
[runtimes.plain]
launch_us = {{ value = 7.0, {GRADED} }}
"""


def target(tables: str) -> Target:
    """A preset that states no runtime, with further tables."""
    text = (resources.files("firsttoken_compiler.target") / "presets" / "systolic-128.toml").read_text("utf-8")
    return parse_target((text + tables).encode(), "here")


def test_what_a_file_says_is_what_a_target_has() -> None:
    found = target(TABLES)
    assert found.runtime("chunks") == Runtime(500.0, 0.0, 128, (512, 1024), ("output",))
    assert found.runtime("plain") == Runtime(7.0)
    assert found.runtime() == found.runtime("chunks")
    assert found.value("runtimes.chunks.launch_us") == 500.0
    assert found.provenance["runtimes.chunks.chunk_tokens"].source == "a test"


def test_programs_do_not_depend_on_runtimes() -> None:
    assert target(TABLES).content_hash == target("").content_hash


def test_without_a_table_whole_graphs_are_dispatched() -> None:
    plain = target("")
    assert plain.runtime() == plain.runtime(DEFAULT_RUNTIME) == Runtime(plain.host.dispatch_us)
    with pytest.raises(TargetError, match="no runtime 'chunk', it has chunks, plain"):
        target(TABLES).runtime("chunk")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[512, 1024]", "[1024, 512]", r"runtimes.chunks.context_buckets is \[1024, 512\], must be .* smallest first"),
        ("[512, 1024]", "[0, 512]", "runtimes.chunks.context_buckets"),
        ("[512, 1024]", '["512"]', "runtimes.chunks.context_buckets"),
        ('"output"', '"attn_q"', "host_roles has 'attn_q', must be of token_embd, output"),
        ("500.0", "-1.0", "runtimes.chunks.launch_us is -1.0, must be at least 0"),
        ("chunk_tokens", "chunk_token", "unknown key runtimes.chunks.chunk_token; nearest known key: chunk_tokens"),
        ("value = 128", "value = 12.8", "runtimes.chunks.chunk_tokens is 12.8"),
        ("launch_us = { value = 7", "node_us = { value = 7", "missing key runtimes.plain.launch_us"),
        ("runtimes.plain", "runtimes.'a b'", "names are letters"),
    ],
)
def test_mistakes_are_named(old: str, new: str, message: str) -> None:
    assert old in TABLES
    with pytest.raises(TargetError, match=message):
        target(TABLES.replace(old, new))
