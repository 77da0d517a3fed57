"""Weights in blocks, as GGUF files hold them: layouts, the planes that the NPU reads, quantisers, and mixing rules."""
