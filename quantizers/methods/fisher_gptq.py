"""GPTQ on the curvature of the KL: grids fitted on the way, then scales and codes in turn."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import rounding
from ..families.low_rank import factors as nearest_factors
from ..feedback import Quadratic, factor
from ..format import PER_TENSOR, Family, Format, family_of
from ..grid_fit import LEAST_RATIO
from ..lines import Grid
from ..packed import PackedTensor
from ..sweep import Lattice, chunks
from . import METHODS, Evidence
from .rtn import fit_grid, rtn

DAMPING = 0.07  # of the mean of the diagonal, where no held-out sequences say
RATIOS = {bits: torch.linspace(1, 0.9 * least, 8).tolist() for bits, least in LEAST_RATIO.items()}
ROUNDS = 2  # of descent on the codes and a refit of the scales
SWEEPS = 4  # of descent over all columns


def has_own_codes(fmt: Format) -> bool:
    """Whether it has codes of its own for a format: of codes on lines, or rounded by its family."""
    return type(family_of(fmt.base or fmt)).line is not Family.line or _by_family(fmt)


def _by_family(fmt: Format) -> bool:
    return type(family_of(fmt)).fit_under is not Family.fit_under


@METHODS.register("fisher_gptq", needs={"fisher"}, rounds=has_own_codes, compiled=True)
def fisher_gptq(weight: Tensor, fmt: Format, evidence: Evidence) -> PackedTensor:
    """Round so that the KL grows least: columns in turn with feedback, then scales, then codes.

    What errors E = W - Q cost is ``tr(E H E^T)``, H the damped curvature of the KL (``fisher``).

    1. Columns are rounded one after the other as by GPTQ, ``H = R D R^T``: column j to the nearest
       of ``W_j + sum_{i<j} E_i R_ij``.  The groups with the largest diagonals of H come first, and
       in a group the columns with the largest.
    2. The grid of a group of an integer format is fitted when the group is reached, to the weights
       as they then are: the squared error of column j weighs ``D_j``, what is left of it after
       feedback.  Other grids (of rows, the tensor, nf4, llama.cpp's blocks) are those of the
       family for the importance ``diag H``, before the first column.
    3. Twice: coordinate descent on the codes, then all scales of a row by least squares, float16.
       Blocks have theirs refitted once; those of the tensor stay.
    4. Families whose codes lie on no lines (trellis codes) round their columns likewise themselves;
       rows that are parts with inputs of their own are rounded to nearest there.
    5. A low-rank correction makes up for what the codes then cost, they are rounded again without
       it, and it is made again.

    No step of 3 raises the cost of a row.  Rows are independent, and what becomes of one depends
    neither on the number of threads nor on which others come with it.  Where nothing is known of
    the curvature weights are rounded to nearest, and so are floats.

    Args:
        weight: The weight [rows, cols], float32.
        fmt: The format.
        evidence: With the curvature.

    Raises:
        ValueError: If the weight or the curvature has NaN or Inf, or values too large for a float16
            scale.

    References:
        Frantar et al. (2023), "GPTQ"; weighted by gradients: Kim et al. (2025), "GuidedQuant";
        both sides of the curvature: Tseng et al. (2025), "YAQA"; order within groups: Gafni et al.
        (2025), "Dual precision quantization"; descent: Behdin et al. (2023), "QuantEase".

    Example:
        >>> weight = torch.tensor([[0.3, 0.3, 0.3, 1.0]])
        >>> evidence = Evidence(fisher=0.9 + 0.1 * torch.eye(4))  # errors that go together
        >>> for method in (rtn, fisher_gptq):
        ...     packed = method(weight, Format.parse("int2-gc"), evidence)
        ...     error = packed.dequantize() - weight
        ...     print(packed.dequantize()[0], f"{(error @ evidence.fisher @ error.T).item():.3f}")
        tensor([0.4414, 0.4414, 0.4414, 0.8828]) 0.092
        tensor([0.3818, 0.3818, 0.3818, 0.7637]) 0.008
    """
    if evidence.fisher is None or not has_own_codes(fmt):
        return rtn(weight, fmt, evidence)
    weight = weight.detach().float().contiguous()
    family_of(fmt).check(weight, fmt)
    parts = evidence.fisher.numel() // evidence.fisher.shape[-1] ** 2
    if len(weight) % parts or weight.shape[1] != evidence.fisher.shape[-1]:
        raise ValueError(
            f"A weight {list(weight.shape)} does not go with the curvature "
            f"{list(evidence.fisher.shape)} of its columns: [cols, cols] or [parts, cols, cols]."
        )
    if _by_family(fmt):
        return _of_family(weight, fmt, evidence)
    if fmt.base is None:
        return _round(weight, fmt, evidence)
    return _corrected(weight, fmt, fmt.base, evidence)


def _corrected(weight: Tensor, fmt: Format, base: Format, evidence: Evidence) -> PackedTensor:
    """Codes, and the low-rank matrix that makes up for most of what their errors cost; twice.

    With C C^T the mean curvature, the right factor is that of the matrix nearest to E C, times the
    inverse of C; the left one is the best of every row for that.
    """
    quadratic = _quadratic(evidence, base)
    mean = quadratic.matrix.mean(0)
    factors = factor(mean / mean.diagonal().mean(), 0)  # float16 holds its factors in any unit
    root = (factors.feedback * factors.pivots.sqrt()[:, None])[0]
    rank, added = min(fmt.rank, *weight.shape), torch.zeros_like(weight)
    for _ in range(ROUNDS):
        codes = _round(weight - added, base, evidence)
        error = weight - codes.dequantize()
        right = nearest_factors(error @ root, rank)[1].float()
        right = torch.linalg.solve_triangular(root, right, upper=True, left=False)
        right = right.half().float()
        blocks = error.view(len(quadratic.matrix), -1, error.shape[1])
        seen = right @ quadratic.matrix  # R H [parts, rank, cols]
        gram = torch.linalg.pinv((seen @ right.T).double(), hermitian=True).float()
        left = (blocks @ seen.mT @ gram).view(-1, rank).half()
        added = left.float() @ right
    parts = {**codes.tensors, "left": left, "right": right.half()}
    return PackedTensor(fmt, codes.shape, parts)


def _of_family(weight: Tensor, fmt: Format, evidence: Evidence) -> PackedTensor:
    """Part by part as the family rounds it."""
    assert evidence.fisher is not None
    matrices = evidence.fisher.reshape(-1, *evidence.fisher.shape[-2:])
    if len(matrices) > 1:  # rows of one walk have inputs of their own: as good as none
        return rtn(weight, fmt, evidence)
    damping = DAMPING if evidence.damping is None else evidence.damping
    family = family_of(fmt)
    fitted = family.fit_under(weight, fmt, matrices[0].float(), evidence.rows, damping)
    return PackedTensor.pack(weight, fmt, fitted)


def _quadratic(evidence: Evidence, fmt: Format) -> Quadratic:
    """The damped curvature in the order for groups as large as those of a format."""
    assert evidence.fisher is not None
    cols = evidence.fisher.shape[-1]
    size = fmt.group_size if 0 < fmt.group_size < cols else cols
    kept = evidence.kept.get("fisher_gptq")  # only the last: it is twice as large as the curvature
    if kept is None or kept[0] != (size, fmt.vector):
        damping = DAMPING if evidence.damping is None else evidence.damping
        quadratic = Quadratic.of(evidence.fisher.float(), damping, size, fmt.vector)
        kept = (size, fmt.vector), quadratic
        evidence.kept["fisher_gptq"] = kept
    found: Quadratic = kept[1]
    return found


def _round(weight: Tensor, fmt: Format, evidence: Evidence) -> PackedTensor:
    """The weight in a format of codes alone."""
    quadratic = _quadratic(evidence, fmt)
    parts, cols = quadratic.order.shape
    on_the_way = fmt.integer and fmt.group_size > 0
    grid = None if on_the_way else _static(weight, fmt, quadratic, evidence)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    grids = []
    for some, rows in chunks(parts, len(weight) // parts, cols):
        part = None if grid is None else grid.rows(rows)
        codes[rows], part = _round_rows(weight[rows], fmt, part, quadratic.of_parts(some))
        grids.append(part)
    whole = grids[0] if fmt.group_size == PER_TENSOR else Grid.joined(grids)
    return PackedTensor.of_codes(codes, fmt, whole)


def _round_rows(
    weight: Tensor, fmt: Format, grid: Grid | None, quadratic: Quadratic
) -> tuple[Tensor, Grid]:
    """Codes and grid of some rows; a grid that is given is only refitted."""
    if grid is None:
        lattice = Lattice.empty(fmt, weight)
        codes = rounding.sweep(weight, fmt, quadratic, lattice, RATIOS[fmt.bits])
        grid = lattice.grid(fmt)
    else:
        lattice = Lattice.of(fmt, grid, *weight.shape)
        codes = rounding.sweep(weight, fmt, quadratic, lattice)
    for turn in range(ROUNDS):
        slopes = rounding.slope(weight - lattice.values(codes), quadratic)
        rounding.descend(codes, slopes, quadratic, lattice, SWEEPS)
        if fmt.block_size == 1 and fmt.group_size != PER_TENSOR:
            basis = lattice._replace(scale=torch.ones_like(lattice.scale)).values(codes)
            scale = rounding.refit(lattice.scale, basis, slopes, quadratic, lattice.size)
            lattice = lattice._replace(scale=scale)
            grid = grid._replace(scale=scale.half())
        elif fmt.block_size > 1 and turn == 0:  # takes long, and gains little when repeated
            grid = _refit(weight, fmt, grid, codes, quadratic)
            lattice = Lattice.of(fmt, grid, *weight.shape)
    return codes, grid


def _static(weight: Tensor, fmt: Format, quadratic: Quadratic, evidence: Evidence) -> Grid:
    """The grid of a format whose scales are not those of groups alone."""
    diagonal = quadratic.matrix.diagonal(dim1=1, dim2=2)
    parts, cols = diagonal.shape
    importance = diagonal[0]
    if parts > 1 or fmt.group_size == PER_TENSOR:
        importance = diagonal[:, None].expand(-1, len(weight) // parts, -1).reshape(-1, cols)
        if evidence.rows is not None:
            importance = importance * evidence.rows[:, None]
    grid = fit_grid(weight, fmt, importance)
    assert isinstance(grid, Grid)
    return grid


def _refit(weight: Tensor, fmt: Format, grid: Grid, codes: Tensor, quadratic: Quadratic) -> Grid:
    """The family's own refit, part by part."""
    size = len(weight) // len(quadratic.matrix)
    found = []
    for part, matrix in enumerate(quadratic.matrix):
        rows = slice(part * size, (part + 1) * size)
        found.append(family_of(fmt).refit(weight[rows], fmt, grid.rows(rows), codes[rows], matrix))
    return Grid.joined(found)
