"""The built-in provider of students; importing it imports nothing heavy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from firsttoken_models.students import SMOLLM2_135M, STUDENTS, student

if TYPE_CHECKING:
    from pathlib import Path

    import onnx

    from firsttoken.student import StudentConfig, StudentFile, Tokenizer, WeightStore


class BuiltinStudents:
    """Students that ship with the project; satisfies `firsttoken.student.StudentProvider`."""

    def names(self) -> tuple[str, ...]:
        """Return the names of the students, in the order to show them."""
        return tuple(STUDENTS)

    def config(self, name: str) -> StudentConfig:
        """Return the student of that name or alias, in any case; raise `UnknownStudent` otherwise."""
        return student(name)

    def graph(
        self, config: StudentConfig, *, tokens: int, past: int, weights: WeightStore | None = None
    ) -> onnx.ModelProto:
        """Return the static graph that processes `tokens` new tokens after a cache of `past` rows."""
        from firsttoken_models.onnx_graph import build_graph

        return build_graph(config, tokens=tokens, past=past, weights=weights)

    def weights(self, name: str) -> WeightStore | None:
        """Return the weights, or None where the student has none here; SmolLM2 is unpacked on first use."""
        if student(name) is not SMOLLM2_135M:
            return None
        from firsttoken_models.smollm2 import load_weights

        return load_weights()

    def tokenizer(self, name: str) -> Tokenizer | None:
        """Return the tokenizer, or None where the student has none here."""
        if student(name) is not SMOLLM2_135M:
            return None
        from firsttoken_models.smollm2 import load_tokenizer

        return load_tokenizer()

    def file(self, path: Path) -> StudentFile | None:
        """Return the student that a GGUF file is, or None for any other file; raise StudentError for a bad one."""
        from firsttoken_models.gguf_file import is_gguf

        if not is_gguf(path):
            return None
        from firsttoken_models.gguf_student import open_gguf

        return open_gguf(path)


PROVIDER: Final = BuiltinStudents()
