"""Compiler from ONNX student graphs to NPU programs: read `pipeline.py` first."""
