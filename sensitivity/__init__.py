"""Sensitivity: what every unit of a model costs in every format."""
