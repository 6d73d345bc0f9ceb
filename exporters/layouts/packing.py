"""The stored bits of a packed weight, rearranged as other runtimes keep them.

Our codes are one LSB-first stream per row, which is what most runtimes read: packing for them is
viewing the same bytes as 32-bit words, transposing those words, or cutting the rows into blocks.
No weight is rounded again; every function here has an inverse that gives back the very codes,
scales and zero points.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...quantizers.format import PER_TENSOR, Format
from ...quantizers.packed import PackedTensor, pack_bits, unpack_bits

Tensors = dict[str, Tensor]


def grid_of(packed: PackedTensor) -> tuple[Tensor, Tensor]:
    """Scales and zero points [rows, groups] of an integer weight; one of a tensor for each row.

    A symmetric format's zero point is written out.

    Raises:
        ValueError: If the format is no integer one, or has no integer zero point (one bit).
    """
    fmt, grid = packed.fmt, packed.grid()
    if grid is None or not fmt.integer or (fmt.symmetric and fmt.bits == 1):
        raise ValueError(f"A weight in {fmt} has no integer zero point. Use another format.")
    scale, zero = grid.scale, grid.zero
    if zero is None:
        zero = torch.full_like(scale, fmt.zero_point, dtype=torch.uint8)
    if fmt.group_size == PER_TENSOR:
        scale, zero = (part.expand(packed.shape[0], 1) for part in (scale, zero))
    return scale, zero


def to_words(stream: Tensor) -> Tensor:
    """Bytes [rows, n] as little-endian 32-bit words, int32 [rows, ceil(n / 4)]."""
    padded = pad(stream, (0, -stream.shape[1] % 4))
    return padded.reshape(-1).view(torch.int32).view(len(stream), -1)


def from_words(words: Tensor, count: int, bits: int) -> Tensor:
    """Codes uint8 [rows, count] from words [rows, ceil(count * bits / 32)]."""
    stream = words.reshape(-1).view(torch.uint8).view(len(words), -1)
    return unpack_bits(stream[:, : -(-count * bits // 8)], bits, count)


def packed_from(codes: Tensor, scale: Tensor, zero: Tensor | None, fmt: Format) -> PackedTensor:
    """A packed weight from its parts: codes [rows, cols], scale and zero [rows, groups].

    Raises:
        ValueError: If ``zero`` is not what a symmetric ``fmt`` implies, or a shape is wrong.
    """
    parts = {"codes": pack_bits(codes, fmt.bits), "scale": scale.contiguous()}
    if fmt.symmetric:
        if zero is not None and not (zero == fmt.zero_point).all():
            raise ValueError(f"The zero points are not the {fmt.zero_point:g} that {fmt} implies.")
    else:
        assert zero is not None
        parts["zero"] = pack_bits(zero.reshape(1, -1), fmt.bits)[0]
    return PackedTensor(fmt, (codes.shape[0], codes.shape[1]), parts)


def split_rows(packed: PackedTensor, ends: Sequence[int]) -> list[PackedTensor]:
    """Blocks of rows as weights of their own, for runtimes that run them one by one.

    Args:
        packed: An integer weight [rows, cols].
        ends: The row after each block but the last, ascending.
    """
    scale, zero = grid_of(packed)
    codes = unpack_bits(packed.tensors["codes"], packed.fmt.bits, packed.shape[1])
    bounds = [0, *ends, packed.shape[0]]
    return [
        packed_from(codes[start:end], scale[start:end], zero[start:end], packed.fmt)
        for start, end in pairwise(bounds)
    ]


def to_compressed_tensors(packed: PackedTensor) -> Tensors:
    """The tensors of the ``pack-quantized`` format (dense packing, since version 0.18).

    Its integers are signed, q = c - 2^(b-1), and are stored with 2^(b-1) added: as c.

    Returns:
        ``weight_packed`` int32 [rows, ceil(cols * b / 32)], ``weight_scale`` fp16 [rows, groups],
        ``weight_shape`` int64 [2] and, if asymmetric, ``weight_zero_point`` int32
        [ceil(rows * b / 32), groups].
    """
    scale, zero = grid_of(packed)
    tensors = {
        "weight_packed": to_words(packed.tensors["codes"]),
        "weight_scale": scale.contiguous(),
        "weight_shape": torch.tensor(packed.shape, dtype=torch.int64),
    }
    if not packed.fmt.symmetric:
        tensors["weight_zero_point"] = to_words(_pack_columns(zero, packed.fmt.bits)).T.contiguous()
    return tensors


def from_compressed_tensors(tensors: Tensors, fmt: Format) -> PackedTensor:
    """Invert :func:`to_compressed_tensors`."""
    rows, cols = tensors["weight_shape"].tolist()
    codes = from_words(tensors["weight_packed"], cols, fmt.bits)
    zero = None
    if not fmt.symmetric:
        zero = from_words(tensors["weight_zero_point"].T, rows, fmt.bits).T
    return packed_from(codes, tensors["weight_scale"], zero, fmt)


def to_gptq(packed: PackedTensor, offset_zeros: bool) -> Tensors:
    """The tensors of GPTQ checkpoints.

    Args:
        packed: A weight whose rows and columns are multiples of 32.
        offset_zeros: Store z - 1, as version 1 of the format does; 0 has no code there.

    Returns:
        ``qweight`` int32 [cols * b / 32, rows], ``qzeros`` int32 [groups, rows * b / 32],
        ``scales`` fp16 [groups, rows] and ``g_idx`` int32 [cols], the group of every column.

    Raises:
        ValueError: If the shape is no multiple of 32, or a zero point has no code.
    """
    rows, cols = packed.shape
    if rows % 32 or cols % 32:
        raise ValueError(f"GPTQ packs 32 rows and columns together, not {rows} x {cols}.")
    scale, zero = grid_of(packed)
    if offset_zeros:
        if not zero.all():
            raise ValueError(
                f"Version 1 of the GPTQ format cannot store the zero point 0 of a weight in "
                f"{packed.fmt}. Write version 2."
            )
        zero = zero - 1
    size = packed.fmt.group_size if packed.fmt.group_size > 0 else cols
    return {
        "qweight": to_words(packed.tensors["codes"]).T.contiguous(),
        "qzeros": to_words(_pack_columns(zero, packed.fmt.bits)),
        "scales": scale.T.contiguous(),
        "g_idx": torch.arange(cols, dtype=torch.int32) // size,
    }


def from_gptq(tensors: Tensors, fmt: Format, offset_zeros: bool) -> PackedTensor:
    """Invert :func:`to_gptq`."""
    words, rows = tensors["qweight"].shape
    cols = words * 32 // fmt.bits
    codes = from_words(tensors["qweight"].T, cols, fmt.bits)
    zero = from_words(tensors["qzeros"], rows, fmt.bits).T + int(offset_zeros)
    return packed_from(codes, tensors["scales"].T, zero, fmt)


def to_mlx(packed: PackedTensor) -> Tensors:
    """The tensors of MLX's affine mode: a weight is q * scale + bias, with bias = -z * scale.

    Scales and biases have one dtype, as MLX needs. In a symmetric format z is a power of two, and
    float16 holds every bias exactly; in an asymmetric one it does not, and both are float32.

    Returns:
        ``weight`` uint32 [rows, cols * b / 32], ``scales`` and ``biases`` [rows, groups].

    Raises:
        ValueError: If a symmetric bias is beyond float16.
    """
    scale, zero = grid_of(packed)
    dtype = torch.float16 if packed.fmt.symmetric else torch.float32
    biases = -zero.float() * scale.float()
    if not torch.equal(biases.to(dtype).float(), biases):
        raise ValueError(
            f"A scale of {float(scale.abs().max()):g} in {packed.fmt} gives a bias that float16 "
            "does not hold. Use an asymmetric format."
        )
    return {
        "weight": to_words(packed.tensors["codes"]).view(torch.uint32),
        "scales": scale.to(dtype).contiguous(),
        "biases": biases.to(dtype),
    }


def from_mlx(tensors: Tensors, fmt: Format) -> PackedTensor:
    """Invert :func:`to_mlx`; the zero point of a group with scale 0 comes back as 0."""
    scales, biases = tensors["scales"].float(), tensors["biases"].float()
    words = tensors["weight"].view(torch.int32)
    codes = from_words(words, words.shape[1] * 32 // fmt.bits, fmt.bits)
    zero = None
    if not fmt.symmetric:
        zero = torch.where(scales == 0, 0, -biases / scales).round().to(torch.uint8)
    return packed_from(codes, scales.half(), zero, fmt)


def to_matmul_nbits(packed: PackedTensor) -> Tensors:
    """The initializers of ONNX Runtime's ``MatMulNBits``.

    A short last group is filled up with codes that nothing is multiplied with. A whole row as one
    group is laid out the same way, though the operator would not take it.

    Returns:
        ``B`` uint8 [rows, groups, ceil(group_size * b / 8)], ``scales`` fp16 [rows, groups] and,
        if asymmetric, ``zero_points`` uint8 [rows, ceil(groups * b / 8)].
    """
    (rows, cols), fmt = packed.shape, packed.fmt
    scale, zero = grid_of(packed)
    groups, codes = scale.shape[1], packed.tensors["codes"]
    block = -(-(fmt.group_size if fmt.group_size > 0 else cols) * fmt.bits // 8)
    tensors = {
        "B": pad(codes, (0, groups * block - codes.shape[1])).view(rows, groups, block),
        "scales": scale.contiguous(),
    }
    if not fmt.symmetric:
        tensors["zero_points"] = pack_bits(zero, fmt.bits)
    return tensors


def from_matmul_nbits(tensors: Tensors, fmt: Format, cols: int) -> PackedTensor:
    """Invert :func:`to_matmul_nbits` for a weight [rows, cols]."""
    scale = tensors["scales"]
    rows, groups = scale.shape
    stream = tensors["B"].reshape(rows, -1)[:, : -(-cols * fmt.bits // 8)]
    codes = unpack_bits(stream, fmt.bits, cols)
    zero = None
    if not fmt.symmetric:
        zero = unpack_bits(tensors["zero_points"], fmt.bits, groups)
    return packed_from(codes, scale, zero, fmt)


def _pack_columns(zero: Tensor, bits: int) -> Tensor:
    """Zero points [rows, groups] packed down every column: uint8 [groups, ceil(rows * b / 8)]."""
    return pack_bits(zero.T.clone(memory_format=torch.contiguous_format), bits)
