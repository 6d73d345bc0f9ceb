"""Multiplication by a ``PlanePack``: the custom op, and what runs it on which device."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from .blocks import ZERO_KINDS, PlaneClass
from .packing import PlanePack
from .planes import ORDERS, Cell, Order

DECODE_TOKENS = 64  # above, the weight is dequantized and multiplied by the vendor's library
_HALVES = (torch.float16, torch.bfloat16)
_TENSORS = ("words", "scales", "zeros", "cells", "table", "codebook", "pairs", "targets")


def order_of(device: torch.device | str) -> Order:
    """The order of words that the matrix instructions of a device take."""
    return "amd" if torch.device(device).type == "cuda" and torch.version.hip else "nvidia"


def plane_linear(
    x: Tensor,
    pack: PlanePack,
    bias: Tensor | None = None,
    sparse: tuple[Tensor, Tensor, Tensor] | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """``x @ (W + S + U D).T + bias``: the weight W of a pack, sparse outliers and a correction.

    Args:
        x: Inputs [..., K].
        pack: The weight W [N, K], on the device of ``x`` and in the order of its family.
        bias: [N] or None.
        sparse: S as compressed sparse rows: starts int32 [N + 1], columns int32, values.
        low_rank: The factors U [N, rank] and D [rank, K].

    Returns:
        Outputs [..., N] in the dtype of ``x``.

    Raises:
        ValueError: If a tensor does not fit, lies on another device, the order is wrong, or
            Triton is needed and not installed.
    """
    _check(x, pack, bias)
    starts, columns, values = sparse or (None, None, None)
    up, down = low_rank or (None, None)
    parts = [getattr(pack, name) for name in _TENSORS]
    outputs: Tensor = plane_linear_op(
        x, *parts, bias, starts, columns, values, down, up, meta_of(pack)
    )
    return outputs


def meta_of(pack: PlanePack) -> list[int]:
    """What the tensors of a pack do not say about it, as integers."""
    meta = [*pack.shape, *pack.cell, ORDERS.index(pack.order)]
    for kind in pack.classes:
        meta += [kind.bits, kind.group, ZERO_KINDS.index(kind.zero)]
    return meta


def pack_of(tensors: Sequence[Any], meta: Sequence[int]) -> PlanePack:
    """Invert :func:`meta_of`; the tensors are in the order of the fields of a pack."""
    rows, cols, cell_rows, cell_cols, order, *kinds = meta
    classes = tuple(
        PlaneClass(kinds[i], kinds[i + 1], ZERO_KINDS[kinds[i + 2]])
        for i in range(0, len(kinds), 3)
    )
    parts: dict[str, Any] = dict(zip(_TENSORS, tensors, strict=True))
    return PlanePack(
        **parts,
        shape=(rows, cols),
        cell=Cell(cell_rows, cell_cols),
        classes=classes,
        order=ORDERS[order],
    )


@torch.library.custom_op("bitplan::plane_linear", mutates_args=())
def plane_linear_op(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor,
    cells: Tensor,
    table: Tensor,
    codebook: Tensor | None,
    pairs: Tensor | None,
    targets: Tensor | None,
    bias: Tensor | None,
    starts: Tensor | None,
    columns: Tensor | None,
    values: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    meta: Sequence[int],
) -> Tensor:
    """The op of :func:`plane_linear`: the tensors of a pack, extras, and ``meta_of`` the pack.

    No result depends on the contents of a tensor, so nothing waits for the device: calls can be
    captured in a CUDA graph (after one call that compiles).
    """
    pack = pack_of((words, scales, zeros, cells, table, codebook, pairs, targets), meta)
    flat = x.reshape(-1, x.shape[-1])
    if len(flat) == 0:
        return x.new_empty(*x.shape[:-1], pack.shape[0])
    extras = (starts, columns, values, down, up)
    run = _run_triton if _uses_triton(x) else _run_torch
    return run(flat, pack, bias, extras).view(*x.shape[:-1], pack.shape[0])


@plane_linear_op.register_fake
def _(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor,
    cells: Tensor,
    table: Tensor,
    codebook: Tensor | None,
    pairs: Tensor | None,
    targets: Tensor | None,
    bias: Tensor | None,
    starts: Tensor | None,
    columns: Tensor | None,
    values: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    meta: Sequence[int],
) -> Tensor:
    return x.new_empty(*x.shape[:-1], meta[0])


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:-1])
    ctx.meta = inputs[-1]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x and bias; the weight, its sparse rows and its correction are constants."""
    *parts, _, starts, _, _, down, up = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        if starts is not None:
            raise RuntimeError("There is no gradient through sparse rows; add them to the weight.")
        grad_x = grad @ plane_weight_op(*parts, ctx.meta).to(grad.dtype)
        if down is not None and up is not None:
            grad_x = grad_x + (grad @ up.to(grad.dtype)) @ down.to(grad.dtype)
    if ctx.needs_input_grad[len(_TENSORS) + 1]:
        grad_bias = grad.flatten(0, -2).sum(0)
    return (grad_x, *[None] * len(_TENSORS), grad_bias, *[None] * 6)


plane_linear_op.register_autograd(_backward, setup_context=_keep_for_backward)


@torch.library.custom_op("bitplan::plane_weight", mutates_args=())
def plane_weight_op(
    words: Tensor,
    scales: Tensor,
    zeros: Tensor,
    cells: Tensor,
    table: Tensor,
    codebook: Tensor | None,
    pairs: Tensor | None,
    targets: Tensor | None,
    meta: Sequence[int],
) -> Tensor:
    """The dequantized weight of a pack: float32 [N, K]."""
    pack = pack_of((words, scales, zeros, cells, table, codebook, pairs, targets), meta)
    if not _uses_triton(words):
        return pack.dequantize()
    require_triton()
    from .triton_launch import dequantize_blocks

    with torch.cuda.device_of(words):
        return pack.in_order(dequantize_blocks(pack, 0, len(table), torch.float32))


@plane_weight_op.register_fake
def _(
    words: Tensor,
    scales: Tensor,
    zeros: Tensor,
    cells: Tensor,
    table: Tensor,
    codebook: Tensor | None,
    pairs: Tensor | None,
    targets: Tensor | None,
    meta: Sequence[int],
) -> Tensor:
    return words.new_empty(meta[0], meta[1], dtype=torch.float32)


def _uses_triton(x: Tensor) -> bool:
    return x.device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def require_triton() -> None:
    """Check that Triton is there.

    Raises:
        ValueError: If it is not.
    """
    if find_spec("triton") is None:
        raise ValueError(
            "Triton is not installed; the kernels for GPUs need it: pip install 'bitplan[kernels]'."
        )


def _run_triton(
    x: Tensor, pack: PlanePack, bias: Tensor | None, extras: tuple[Tensor | None, ...]
) -> Tensor:
    require_triton()
    from .triton_launch import Extras, multiply, multiply_dense
    from .tune import choose_launch

    bias, *parts = (None if t is None else t.contiguous() for t in (bias, *extras))
    with torch.cuda.device_of(x):  # Triton launches on the current device, whatever its arguments
        if len(x) > DECODE_TOKENS or x.dtype not in _HALVES:
            return multiply_dense(x.contiguous(), pack, bias, Extras(*parts), x.dtype)
        return multiply(x, pack, bias, Extras(*parts), choose_launch(x, pack))


def _run_torch(
    x: Tensor, pack: PlanePack, bias: Tensor | None, extras: tuple[Tensor | None, ...]
) -> Tensor:
    """The same with plain torch, for devices without a kernel: slow, and W exists at once."""
    starts, columns, values, down, up = extras
    weight = pack.dequantize()
    if starts is not None and columns is not None and values is not None:
        rows = torch.repeat_interleave(torch.arange(len(weight), device=x.device), starts.diff())
        weight.index_put_((rows, columns.long()), values.float(), accumulate=True)
    if down is not None and up is not None:
        weight.addmm_(up.float(), down.float())
    return torch.nn.functional.linear(x, weight.to(x.dtype), bias)


def _check(x: Tensor, pack: PlanePack, bias: Tensor | None) -> None:
    rows, cols = pack.shape
    if x.shape[-1] != cols:
        raise ValueError(
            f"The input has {x.shape[-1]} columns, the weight [{rows}, {cols}] needs {cols}."
        )
    if bias is not None and tuple(bias.shape) != (rows,):
        raise ValueError(f"The bias must be [{rows}], but is {list(bias.shape)}.")
    if x.device.type == "cuda" and pack.order != order_of(x.device):
        raise ValueError(
            f"The weight is laid out for {pack.order}, but the input is on {x.device}, which "
            f"takes {order_of(x.device)}. Lay it out with order_of(device)."
        )
    if x.device != pack.words.device:
        raise ValueError(
            f"The input is on {x.device}, the weight on {pack.words.device}. Move one of them."
        )
