"""The branch of an If that is always taken, as nodes of the graph around it."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

from firsttoken_compiler.frontend.check_graph import subgraphs
from firsttoken_compiler.frontend.inline import fresh, renamed
from firsttoken_compiler.frontend.onnx_file import Initializer, OnnxStudent, describe
from firsttoken_compiler.frontend.values import copied


class Branches:
    """Takes branches out of one student; names stay where no other value or node has them."""

    def __init__(self, student: OnnxStudent) -> None:
        self.student = student

    def taken(self, node: Any, condition: bool, same: Mapping[str, str]) -> tuple[list[Any], dict[str, Any]]:
        """Nodes that make the results of an If, and the initialisers that they read, by name.

        `same` are values outside that have disappeared, and what stands for them.
        """
        from onnx import helper

        wanted = "then_branch" if condition else "else_branch"
        graph = next(attribute.g for attribute in node.attribute if attribute.name == wanted)
        names = {**same, **self._names(node, graph)}
        nodes = [self._named(renamed(inner, names), f"{node.name}.{inner.op_type}") for inner in graph.node]
        for index, (value, output) in enumerate(zip(graph.output, node.output, strict=False)):
            if output:
                source = names.get(value.name, value.name)
                name = node.name if not index else fresh(f"{node.name}.{index}", self._nodes)
                nodes.append(helper.make_node("Identity", [source], [output], name=name))
        return nodes, {names.get(tensor.name, tensor.name): tensor for tensor in graph.initializer}

    def describe(self, name: str, tensor: Any) -> Initializer:
        """An initialiser of a branch under its new name."""
        return replace(describe(tensor, self.student.name), name=name)

    def _named(self, node: Any, otherwise: str) -> Any:
        """A copy with a name that no other node has."""
        copy = copied(node)
        copy.name = fresh(node.name or otherwise, self._nodes)
        copy.domain = "" if copy.domain == "ai.onnx" else copy.domain
        self._nodes.add(copy.name)
        return copy

    def _names(self, node: Any, graph: Any) -> dict[str, str]:
        """New names for values of a branch that others, of other branches, have too."""
        names = {}
        for name in _made(graph):
            if self._counts[name] > 1:
                names[name] = fresh(f"{node.name}/{name}", self._values)
                self._values.add(names[name])
        return names

    @cached_property
    def _nodes(self) -> set[str]:
        return {node.name for node in self.student.graph.node}

    @cached_property
    def _counts(self) -> Counter[str]:
        """How many graphs and subgraphs make a value of a name."""
        graph = self.student.graph
        outside = {*(value.name for value in graph.input), *self.student.initializers}
        outside.update(name for node in graph.node for name in node.output)
        inside = (name for node in graph.node for inner in subgraphs(node) for name in _made_anywhere(inner))
        return Counter([*outside, *inside])

    @cached_property
    def _values(self) -> set[str]:
        return set(self._counts)


def _made(graph: Any) -> Iterator[str]:
    yield from (tensor.name for tensor in graph.initializer)
    yield from (name for node in graph.node for name in node.output if name)


def _made_anywhere(graph: Any) -> Iterator[str]:
    yield from (value.name for value in graph.input)
    yield from _made(graph)
    for node in graph.node:
        for inner in subgraphs(node):
            yield from _made_anywhere(inner)
