"""ONNX in, Relax out; the only room that knows ONNX."""
