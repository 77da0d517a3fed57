"""Forms of instructions: equal exactly where all but addresses, queue, operator and synchronisation is."""

from __future__ import annotations

import numpy as np
import pytest

from firsttoken_compiler.isa import forms as module
from firsttoken_compiler.isa import word
from firsttoken_compiler.isa.forms import ADDRESSES, COLUMNS, forms_of


def test_forms_are_equal_exactly_where_their_columns_are() -> None:
    rng = np.random.default_rng(3)
    code = rng.integers(0, 2, (400, word.WIDTH)) * rng.integers(0, 2, word.WIDTH)
    forms = forms_of(code)
    rows = [tuple(row) for row in code[:, list(COLUMNS)].tolist()]
    for first, of in zip(rows, forms.of.tolist(), strict=True):
        assert rows[forms.first[of]] == first
    assert len(forms.first) == len(set(rows))


def test_addresses_and_provenance_make_no_other_form() -> None:
    code = np.ones((5, word.WIDTH), np.int64)
    code[:, ADDRESSES] = np.arange(35).reshape(5, 7)
    code[:, word.OP] = np.arange(5)
    code[:, word.QUEUE] = np.arange(5)
    assert forms_of(code).of.tolist() == [0] * 5
    code[3, word.FLAGS] = 7
    assert len(forms_of(code).first) == 2


def test_forms_with_one_mixture_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_mixed", lambda rows: np.zeros(len(rows), np.int64))
    code = np.zeros((3, word.WIDTH), np.int64)
    code[1, word.DIMS] = 2
    forms = forms_of(code)
    assert forms.of[0] == forms.of[2] != forms.of[1]


def test_no_code_has_no_forms() -> None:
    forms = forms_of(np.zeros((0, word.WIDTH), np.int64))
    assert (len(forms.first), len(forms.of)) == (0, 0)
