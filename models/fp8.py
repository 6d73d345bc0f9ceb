"""Checkpoints of 8-bit floats with scales by blocks, decoded to bfloat16."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

METHOD = "fp8"  # the `quant_method` of these checkpoints
SCALE = "_scale_inv"  # what a scale's name adds to its weight's
# Scales of activations, which only matter where activations are rounded to 8 bits, too.
ACTIVATIONS = (".activation_scale", ".input_scale")


def block_of(config: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns that share a scale; 0 is all of them.

    Args:
        config: The quantization_config.

    >>> block_of({"quant_method": "fp8", "weight_block_size": [128, 64]})
    (128, 64)
    """
    size = config.get("weight_block_size")
    return (int(size[0]), int(size[1])) if size else (0, 0)


def decode_fp8(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """``weight * scale`` with a scale for each block, rounded to bfloat16.

    Args:
        weight: 8-bit floats [..., rows, cols].
        scale: Scales [..., ceil(rows / block), ceil(cols / block)], or one for all.
        block: Rows and columns that share a scale; 0 is all.

    Raises:
        ValueError: If there are not as many scales as blocks.

    >>> import torch
    >>> weight = torch.ones(3, 2).to(torch.float8_e4m3fn)
    >>> decode_fp8(weight, torch.tensor([[2.0], [4.0]]), (2, 2)).tolist()
    [[2.0, 2.0], [2.0, 2.0], [4.0, 4.0]]
    """
    factor = scale.float()
    if factor.numel() > 1:
        for dim in (-2, -1):
            size, count = weight.shape[dim], factor.shape[dim] if factor.dim() >= 2 else 0
            each = block[dim] or size
            if count != -(-size // each):
                raise ValueError(
                    f"it has {list(scale.shape)} scales for blocks of {list(block)} in a matrix "
                    f"{list(weight.shape)}"
                )
            factor = factor.repeat_interleave(each, dim).narrow(dim, 0, size)
    return (weight.float() * factor).bfloat16()


def scales_of(names: Collection[str]) -> set[str]:
    """Scales among the tensors of a checkpoint of 8-bit floats; none in any other.

    >>> sorted(scales_of({"a.weight", "a.weight_scale_inv", "a.input_scale", "b.scale_inv"}))
    ['a.input_scale', 'a.weight_scale_inv']
    """
    scales = {f"{name}{SCALE}" for name in names}.intersection(names)
    modules = {scale.rpartition(".")[0] for scale in scales}
    inputs = {module + ending for module in modules for ending in ACTIVATIONS}
    return scales | inputs.intersection(names)


def weights_of(names: Collection[str]) -> list[str]:
    """Tensors of a checkpoint that are no scales."""
    scales = scales_of(names)
    return [name for name in names if name not in scales]
