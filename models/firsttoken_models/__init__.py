"""Students: dimensions, ONNX graphs, real weights and tokenizers."""
