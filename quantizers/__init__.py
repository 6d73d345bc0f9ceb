"""Formats, grids, rounding methods and packed tensors: what a weight becomes, in bytes."""
