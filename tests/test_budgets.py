"""Size budgets: functions and files that stay readable, and an import that stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path
    for folder in ("compiler", "simulator", "models", "tests", "reports")
    for path in (ROOT / folder).rglob("*.py")
    if "__pycache__" not in path.parts
)
MOST_FUNCTION_LINES = 60
MOST_FILE_LINES = 600
HEAVY = {"tvm", "numba", "torch", "onnx", "onnxruntime"}


def is_kernel(function: ast.AST) -> bool:
    """Compiled by numba: cut into pieces it would be slower."""
    decorators = getattr(function, "decorator_list", [])
    return any("njit" in ast.unparse(decorator) for decorator in decorators)


def test_no_function_is_longer_than_a_page() -> None:
    long = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {node.end_lineno - node.lineno + 1} lines"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None
        if node.end_lineno - node.lineno >= MOST_FUNCTION_LINES and not is_kernel(node)
    ]
    assert not long, f"longer than {MOST_FUNCTION_LINES} lines: {long}"


def test_no_file_is_longer_than_its_budget() -> None:
    counts = {path.relative_to(ROOT): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    long = {str(path): count for path, count in counts.items() if count > MOST_FILE_LINES}
    assert not long, f"longer than {MOST_FILE_LINES} lines: {long}"


@pytest.mark.parametrize("module", ["firsttoken", "firsttoken.cli"])
def test_import_is_light(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
