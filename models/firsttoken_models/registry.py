"""The built-in provider of students; importing it imports nothing heavy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from firsttoken_compiler.errors import OptionError
from firsttoken_models.students import SMOLLM2_135M, STUDENTS, student

if TYPE_CHECKING:
    from pathlib import Path

    import onnx

    from firsttoken.encoder import EncoderConfig
    from firsttoken.image_network import ImageNetworkConfig
    from firsttoken.options import Progress
    from firsttoken.student import StoredType, StudentConfig, StudentFile, Tokenizer, WeightStore
    from firsttoken_models.gguf_file import GgufFile
    from firsttoken_models.weights import FileWeights


class BuiltinStudents:
    """Students that ship with the project; satisfies `firsttoken.student.StudentProvider`."""

    def names(self) -> tuple[str, ...]:
        """Return the names of the students, in the order to show them."""
        return tuple(STUDENTS)

    def config(self, name: str) -> StudentConfig | EncoderConfig | ImageNetworkConfig:
        """Return the student of that name or alias, in any case; raise `UnknownStudent` otherwise."""
        return student(name)

    def graph(
        self, config: StudentConfig, *, tokens: int, past: int, weights: WeightStore | None = None,
        all_logits: bool = False,
    ) -> onnx.ModelProto:  # fmt: skip
        """Return the static graph that processes `tokens` new tokens after a cache of `past` rows."""
        from firsttoken_models.onnx_graph import build_graph

        return build_graph(config, tokens=tokens, past=past, weights=weights, all_logits=all_logits)

    def encoder_graph(
        self, config: EncoderConfig, *, tokens: int, weights: WeightStore | None = None
    ) -> onnx.ModelProto:
        """Return the static graph of an encoder for an input of `tokens` tokens."""
        from firsttoken_models.encoder_graph import build_encoder_graph

        return build_encoder_graph(config, tokens=tokens, weights=weights)

    def image_graph(self, config: ImageNetworkConfig) -> onnx.ModelProto:
        """Return the static graph of a network for one image."""
        from firsttoken_models.resnet_graph import build_resnet

        return build_resnet(config)

    def image_tensors(self, config: ImageNetworkConfig) -> tuple[str, ...]:
        """Return the tensors of that graph whose ranges decide all static scales of activations."""
        from firsttoken_models.resnet_graph import ranged_tensors

        return ranged_tensors(config)

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

    def quantise(
        self, source: str | Path, path: Path, kind: str, progress: Progress | None = None
    ) -> tuple[StoredType, ...]:
        """Write a student, by its name or its GGUF file, as a GGUF file under a name of `POLICIES`."""
        from pathlib import Path

        from firsttoken_compiler.formats.policy import policy_of
        from firsttoken_models.gguf_student import open_gguf
        from firsttoken_models.gguf_write import mixed, write_gguf

        policy = policy_of(kind)

        if isinstance(source, Path):
            file = open_gguf(source)
            config, weights, words = file.config, file.float_weights(), file.file
        else:
            config, weights, words = self._real(source)
        rule = mixed(policy, config)
        return write_gguf(path, config, weights.tensor, rule, kind=kind, tokenizer=words, progress=progress)

    def _real(self, name: str) -> tuple[StudentConfig, FileWeights, GgufFile]:
        """Dimensions, float32 weights, and the file that the tokenizer is in."""
        config = student(name)
        if config is not SMOLLM2_135M:
            raise OptionError(f"{config.name} has no weights here: give smollm2-135m, or a GGUF file")
        from firsttoken_models import gguf_file, smollm2

        return SMOLLM2_135M, smollm2.load_weights(), gguf_file.read(smollm2.gguf_file()[0])


PROVIDER: Final = BuiltinStudents()
