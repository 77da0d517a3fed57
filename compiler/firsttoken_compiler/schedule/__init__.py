"""Tiling of products, attention and row-wise operators, and the cost that chooses it."""
