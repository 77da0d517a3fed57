"""Compiler from ONNX student graphs to NPU programs: read `pipeline.py` first."""

import os

# onnxruntime from 1.29 on reports to its makers and keeps an identifier on disk, unless it is told before it loads.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
