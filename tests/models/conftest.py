"""Fixtures of small students; see `students`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from students import llama, qwen2, tiny, uneven  # noqa: F401
