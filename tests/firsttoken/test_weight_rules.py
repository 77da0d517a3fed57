"""Mixed formats: lines and files of rules, and the message of each mistake."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firsttoken.options import RunOptions
from firsttoken.weight_rules import inline_rules, parse_rules, rules_of, to_toml
from firsttoken_compiler.errors import OptionError
from firsttoken_compiler.options import FORMATS, MATRICES, WeightRule

FILE = """
[[rule]]
role = "attn_v"
layers = "0-3, 28"
weights = "int8"
[[rule]]
role = "ffn_*"
layers = 5
weights = "q4_k"
[[rule]]
role = "output"
weights = "q6_k"
"""
RULES = (
    WeightRule("attn_v", "int8", ((0, 3), (28, 28))), WeightRule("ffn_*", "q4_k", ((5, 5),)),
    WeightRule("output", "q6_k"),
)  # fmt: skip


def test_a_file_and_a_line_say_the_same(tmp_path: Path) -> None:
    path = tmp_path / "mix.toml"
    path.write_text(FILE, encoding="utf-8")
    assert rules_of(str(path)) == RULES == rules_of("attn_v@0-3+28=int8, ffn_*@5=q4_k,output=q6_k")
    assert inline_rules(",".join(rule.text() for rule in RULES)) == RULES
    assert RunOptions(weights="int4", rules=RULES).precision().rules == RULES


rule = st.builds(
    WeightRule,
    st.sampled_from([*(m for m in MATRICES if m != "token_embd"), "attn_*", "ffn_*", "*"]),
    st.sampled_from(FORMATS),
    st.lists(st.tuples(st.integers(0, 9), st.integers(9, 99)), max_size=3).map(tuple),
)


@given(st.lists(rule, min_size=1, max_size=5).map(tuple))
def test_rules_survive_being_written(rules: tuple[WeightRule, ...]) -> None:
    assert parse_rules(to_toml(rules).encode(), "written") == rules
    assert inline_rules(",".join(one.text() for one in rules)) == rules


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("attn_v=int8,what", "--mix, rule 2: 'what' is no rule; write ROLE=WEIGHTS"),
        ("attn_v=int8=int4", "rule 1: 'attn_v=int8=int4' is no rule"),
        ("attn_v@a=int8", "--mix, rule 1: layers 'a' are no numbers"),
        ("attn_v@3-1=int8", "--mix, rule 1: layers"),
        ("atn=int8", "--mix, rule 1: role 'atn' is none of attn_q"),
        ("attn_q=int4,output=int5", "--mix, rule 2: weights 'int5' is not one of int4"),
    ],
)
def test_mistakes_in_lines(line: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        rules_of(line)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[rule]\n", "--mix f is not valid TOML: .*line 1"),
        ("", r"--mix f: \[\[rule\]\] is missing"),
        ("rule = []", "--mix f: 0 rules; give 1 to 4096"),
        ("rule = 3", "is 3: input should be a valid list"),
        ('[[rule]]\nrole = "attn_q"', "rule 1, weights is missing"),
        ('[[rule]]\nrole = "attn_q"\nweights = "int8"\nlayer = 3', "rule 1, layer: unknown key; keys are role"),
        ('[[rule]]\nrole = 3\nweights = "int8"', "rule 1, role is 3: input should be a valid string"),
        ('[[rule]]\nrole = "attn_q"\nweights = "int9"', "--mix f, rule 1: weights 'int9' is not one of"),
        ('[[rule]]\nrole = "*"\nlayers = "x"\nweights = "int8"', "--mix f, rule 1: layers 'x' are no numbers"),
        ("\udcff", "not valid TOML"),
    ],
)
def test_mistakes_in_files(text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        parse_rules(text.encode("utf-8", "surrogateescape"), "f")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"--mix nothing\.toml: no such file"):
        rules_of("nothing.toml")
    large = tmp_path / "large.toml"
    large.write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(OptionError, match="1048577 bytes, the limit is 1048576"):
        rules_of(str(large))
