"""A little of the fuzzing that `make fuzz` does for long, on the same damage in every run."""

import contextlib
import random
import sys
import warnings
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import making
import mutate
from fuzz import Worker, corpus

from firsttoken import api
from firsttoken.options import RunOptions
from firsttoken_compiler.errors import FirsttokenError
from firsttoken_compiler.frontend.bind import bind_dims
from firsttoken_compiler.frontend.onnx_file import open_student
from firsttoken_compiler.frontend.specialise import specialise

FOUND = sorted((Path(__file__).parent / "found").glob("*.onnx"))
"""Files for which the fuzzer once got something else: see README.md beside them."""


@pytest.fixture(scope="module")
def models() -> list[bytes]:
    return corpus()


def read(path: Path) -> None:
    student = open_student(path)
    specialise(student, bind_dims(student, prompt=4, past=2))


def test_the_corpus_itself_is_sound(models: list[bytes], tmp_path: Path) -> None:
    for model in models:
        read(making.save(model, tmp_path))


@pytest.mark.parametrize("seed", range(20))
def test_damaged_models_are_refused_or_read(models: list[bytes], seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(15):
            path = making.save(mutate.damaged(chance.choice(models), chance), tmp_path)
            with contextlib.suppress(FirsttokenError):
                read(path)


@pytest.mark.parametrize("path", FOUND, ids=[path.stem for path in FOUND])
def test_what_was_found_before_is_refused_or_compiled(path: Path) -> None:
    with contextlib.suppress(FirsttokenError):
        program = api.compile(path, "systolic-128", options=RunOptions(weights_absent=True))
        assert len(api.simulate(program, "systolic-128").start_fs) == len(program)


def test_damage_reaches_every_kind_of_field(models: list[bytes]) -> None:
    chance = random.Random(0)
    changed = [mutate.damaged(models[0], chance) for _ in range(50)]
    assert len(set(changed)) > 45
    assert models[0] not in changed[:1]


def test_the_watched_process_tells_programs_from_refusals(tmp_path: Path) -> None:
    process = Worker()
    try:
        assert process.attempt(making.save(making.product(), tmp_path)) == {"end": "compiled", "why": ""}
        assert process.attempt(making.save(b"no model", tmp_path))["end"] == "refused"
        chance, models = random.Random(7), corpus()
        for _ in range(10):
            path = making.save(mutate.damaged(chance.choice(models), chance), tmp_path)
            assert process.attempt(path)["end"] in ("refused", "compiled")
        assert process.alive
    finally:
        process.stop()
    assert not process.alive
