"""What low precision in some matrices does to a student: onnxruntime on the float graph with other values in them.

Weights have the values that the machine's formats hold, bit for bit; activations, norms and caches stay float32. That
is what makes it cheap, and what an execution of the program adds to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from firsttoken.divergence import Scores, score
from firsttoken.generation import ort_session, token_feeds
from firsttoken.prose import Window
from firsttoken.subject import Built
from firsttoken_compiler.errors import OptionError

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

    from firsttoken.matrices import Matrix

    Arrays = Mapping[str, NDArray[np.float32]]

GATHERED: Final = ".gathered"
"""Added to the name of a table where its rows are gathered: a head may share it, and be of another format."""


class Weighed:
    """The float32 graph of a student in onnxruntime, its matrices inputs of it."""

    def __init__(self, student: Built, chosen: Sequence[Window]) -> None:
        """`chosen`: the windows that it is measured on, of one length."""
        floats = student.float_weights()
        assert floats is not None
        tokens = len(chosen[0].ids)
        model = student.provider.graph(student.config, tokens=tokens, past=0, weights=floats, all_logits=True)
        self.arrays: dict[str, NDArray[np.float32]] = {}
        """The student's own matrices by the names of their initialisers."""
        self._gathered: dict[str, str] = {}
        self._open_inputs(model, replace(student, weights=floats).open(tokens, 0))
        self._session = ort_session(model, floats)
        self._chosen = chosen
        self._reference = [self._logits(window, {}) for window in chosen]

    def scores(self, replaced: Arrays) -> Scores:
        """The windows' tokens, with other values in the products of these initialisers, against the student's own."""
        pairs = zip(self._chosen, self._reference, strict=True)
        return Scores.joined([score(self._logits(w, replaced), own, w.following) for w, own in pairs])

    def require(self, matrices: Iterable[Matrix]) -> None:
        """Raises OptionError unless matrices of the compiled graph lie in the float32 graph as they do there."""
        for matrix in matrices:
            shape = (matrix.n, matrix.k) if matrix.transposed else (matrix.k, matrix.n)
            if matrix.source not in self.arrays or self.arrays[matrix.source].shape != shape:
                raise OptionError(
                    f"weight {matrix.source} is not stored as float32 [{matrix.k}, {matrix.n}], its formats cannot be "
                    "tried: give a built-in student with weights, such as smollm2-135m"
                )

    def _open_inputs(self, model: onnx.ModelProto, student: Any) -> None:
        """Makes inputs of the matrices outside the file, and one more of each whose rows are gathered."""
        from onnx import TensorProto, helper

        outside = TensorProto.EXTERNAL
        matrices = [i for i in model.graph.initializer if i.data_location == outside and len(i.dims) == 2]
        for matrix in matrices:
            self.arrays[matrix.name] = student.array(matrix.name)
            model.graph.initializer.remove(matrix)
        for node in model.graph.node:
            if node.op_type == "Gather" and node.input[0] in self.arrays:
                self._gathered[node.input[0] + GATHERED] = node.input[0]
                node.input[0] += GATHERED
        read = {name for node in model.graph.node for name in node.input}
        for matrix in matrices:
            for name in {matrix.name, matrix.name + GATHERED} & read:
                value = helper.make_tensor_value_info(name, TensorProto.FLOAT, list(matrix.dims))
                model.graph.input.append(value)
        self._inputs = [name for name in (*self.arrays, *self._gathered) if name in read]

    def _logits(self, window: Window, replaced: Arrays) -> NDArray[np.float32]:
        values = {name: self.arrays[self._gathered.get(name, name)] for name in self._inputs}
        values |= {name: array for name, array in replaced.items() if name in self._inputs}
        (found,) = self._session.run(["logits"], {**token_feeds(window.ids), **values})
        result: NDArray[np.float32] = found[0]
        return result
