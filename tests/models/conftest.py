"""Fixtures of small students; see `students`."""

from students import llama, qwen2, tiny, uneven  # noqa: F401
