"""Students: dimensions, ONNX graphs, real weights, tokenizers and generation."""
