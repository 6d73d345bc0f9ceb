"""Scales that make matrices easier to round, chosen before any price: AWQ's and SINQ's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from .._base.hints import did_you_mean
from .._base.progress import Reporter
from ..models.folds import Fold
from ..models.samples import Samples
from ..models.sites import Place, places
from ..models.workload import LoadedModel
from ..quantizers.feedback import Quadratic
from ..quantizers.format import Format
from ..quantizers.methods import METHODS, Evidence
from ..quantizers.methods.fisher_gptq import DAMPING
from ..quantizers.methods.rtn import rtn
from .evidence import LIMIT
from .shared_inputs import in_rounds, watch_inputs

NONE = "none"
FOLDS = ("awq", "sinq")
REVISION = 1  # raised when other scales come of the same model and sequences
EXPONENTS = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
ROWS = 1024  # of every matrix that are rounded for it
PROBE_BITS = 3  # scales matter most at few bits
LEAST = 1e-4  # of the mean: below this no channel's magnitude counts
ROUNDS = 8  # of Sinkhorn's iteration
STEP = (0.7, 2.0)  # of a round: the least and the most


def check_fold(method: str) -> None:
    """Raise unless a method is known.

    Raises:
        ValueError: Names those that are.
    """
    if method not in (NONE, *FOLDS):
        hint = did_you_mean(method, (NONE, *FOLDS))
        raise ValueError(f"Unknown fold {method!r}.{hint} Available: {NONE}, {', '.join(FOLDS)}.")


@torch.no_grad()
def fold_scales(
    model: LoadedModel,
    folds: Sequence[Fold],
    method: str,
    samples: Samples,
    formats: Sequence[Format],
    rounding: str,
    reporter: Reporter | None = None,
) -> dict[str, Tensor]:
    r"""The scales of every fold, by the name of its source.

    ``awq``
        ``s = m^a`` with m the mean magnitude of the channel, and the exponent a of 0, 1/8, ..., 1
        that makes the least of ``sum_i v E_i^2 / v W_i^2`` over the fold's matrices,
        ``E_i = Q(W_i diag(s)) diag(1/s) - W_i``. Q rounds to nearest in the candidate format whose
        bits are nearest to 3, and v is what an error in a column costs: the mean square of its
        input, or of a rounding method that feeds errors back the pivots of the inputs' second
        moment, what is left of it then.
        Where feedback has evened out what channels cost, the exponent is near 0.
    ``sinq``
        ``s = 1 / t`` with t the column factors of ``W = diag(r) V diag(t)`` that make the root mean
        squares of rows and columns of V as alike as they get. Looks at no data.

    Scales are normalized so that the smallest and the largest are each other's inverse.

    Args:
        model: The original model.
        folds: Where the scales can go.
        method: ``awq`` or ``sinq``.
        samples: What ``awq`` sees of the inputs.
        formats: The candidate formats.
        rounding: Name of the rounding method.
        reporter: Where progress is shown.

    References:
        Lin et al. (2024), "AWQ: Activation-aware weight quantization"; Mueller et al. (2025),
        "SINQ: Sinkhorn-normalized quantization", whose folded form is pre-SINQ.
    """
    check_fold(method)
    reporter = reporter or Reporter(quiet=True)
    known = {place.name: place for place in places(model.module)}
    found: dict[str, Tensor] = {}
    if method == "sinq":
        with reporter.bar("Choosing scales (sinq)", len(folds)) as advance:
            for fold in folds:
                found[fold.source] = sinq_scale(fold, _matrices(fold, known))
                advance(1)
        return found
    probe = min(formats, key=lambda fmt: (fmt.floating, abs(fmt.bits - PROBE_BITS)))
    feeds_back = bool(METHODS.trait(rounding, "needs", ()))
    for fold, seen in _inputs(model, folds, known, samples, feeds_back, reporter):
        magnitude = (seen.magnitudes / max(1, seen.count)).cpu()
        importance = seen.importance(probe.group_size)
        found[fold.source] = awq_scale(fold, _matrices(fold, known), magnitude, importance, probe)
    return found


def _matrices(fold: Fold, known: Mapping[str, Place]) -> list[Tensor]:
    parameters = [(known[name], known[name].parameter.detach()) for name in fold.matrices]
    return [place.matrix(parameter).float().cpu() for place, parameter in parameters]


def awq_scale(
    fold: Fold, matrices: Sequence[Tensor], magnitude: Tensor, importance: Tensor, probe: Format
) -> Tensor:
    """The scales of AWQ [channels]; see :func:`fold_scales`.

    Args:
        fold: Where they go.
        matrices: The matrices [rows, cols].
        magnitude: Mean magnitude of the input of every column [cols].
        importance: What a squared error in a column costs [cols].
        probe: The format that is rounded to.
    """
    some = [matrix[:: max(1, len(matrix) // ROWS)] for matrix in matrices]
    whole = [float((matrix.square() @ importance).sum()) or 1.0 for matrix in some]
    magnitude = fold.over_channels(magnitude)

    def error(scale: Tensor) -> float:
        columns, total = fold.over_columns(scale), 0.0
        for matrix, size in zip(some, whole, strict=True):
            rounded = rtn((matrix * columns).contiguous(), probe, Evidence()).dequantize()
            wrong = rounded / columns - matrix
            total += float((wrong.square() @ importance).sum()) / size
        return total

    return min((normalized(magnitude, exponent) for exponent in EXPONENTS), key=error)


def sinq_scale(fold: Fold, matrices: Sequence[Tensor]) -> Tensor:
    """The scales of pre-SINQ [channels]; see :func:`fold_scales`.

    >>> fold = Fold("norm", ("up",), channels=2)
    >>> sinq_scale(fold, [torch.tensor([[1.0, 4.0], [-1.0, -4.0], [2.0, -8.0]])])
    tensor([2.0000, 0.5000])
    """
    matrix = torch.cat(list(matrices))
    rows, cols = torch.ones(len(matrix), 1), torch.ones(matrix.shape[1])
    best, least = cols, float("inf")
    for _ in range(ROUNDS):
        balanced = matrix / rows / cols
        by_row = balanced.square().mean(1, keepdim=True).sqrt()
        by_col = balanced.square().mean(0).sqrt()
        ends = [values[values > 0] for values in (by_row, by_col)]
        imbalance = max((float(v.max() / v.min()) for v in ends if len(v)), default=1.0)
        if imbalance < least:
            best, least = cols, imbalance
        rows = rows * _step(by_row)
        cols = cols * _step(by_col)
    return normalized(fold.over_channels(1 / best), 1.0)


def normalized(values: Tensor, exponent: float) -> Tensor:
    """Positive values to a power, such that the smallest is the inverse of the largest.

    >>> normalized(torch.tensor([1.0, 4.0]), 0.5)
    tensor([0.7071, 1.4142])
    """
    scale = values.clamp_min(max(LEAST * float(values.mean()), 1e-30)) ** exponent
    return scale / (scale.max() * scale.min()).sqrt()


def _step(sizes: Tensor) -> Tensor:
    """Factors towards equal sizes, none too far from 1; 1 where there is nothing but zeros."""
    relative = (sizes / sizes.mean()).clamp(*STEP)
    return torch.where(sizes > 0, relative, torch.ones_like(relative))


class _Seen:
    """Sums over a fold's inputs: their magnitudes, and their squares or products."""

    def __init__(self, products: bool) -> None:
        self.products, self.count = products, 0
        self.magnitudes = self.squares = torch.zeros(())

    def add(self, x: Tensor) -> None:
        flat = x.reshape(-1, x.shape[-1]).float()
        self.count += len(flat)
        self.magnitudes = self.magnitudes + flat.abs().sum(0)
        self.squares = self.squares + (flat.T @ flat if self.products else flat.square().sum(0))

    def importance(self, size: int) -> Tensor:
        """What an error in each column costs [cols], for grids of ``size`` columns a group."""
        mean = (self.squares / max(1, self.count)).cpu()
        if not self.products:
            return mean
        quadratic = Quadratic.of(mean, DAMPING, size if 0 < size < len(mean) else len(mean))
        return torch.empty(len(mean)).scatter_(0, quadratic.order[0], quadratic.pivots[0])


def _inputs(
    model: LoadedModel,
    folds: Sequence[Fold],
    known: Mapping[str, Place],
    samples: Samples,
    products: bool,
    reporter: Reporter,
) -> Iterator[tuple[Fold, _Seen]]:
    """What is seen of the input that the matrices of each fold share."""

    def room(fold: Fold) -> int:
        cols = len(fold.columns) or fold.channels
        return 4 * cols * (cols if products else 2)

    rounds = in_rounds(folds, LIMIT, room)
    for i, some in enumerate(rounds, 1):
        seen = [_Seen(products) for _ in some]
        places = {str(j): [known[fold.matrices[0]]] for j, fold in enumerate(some)}
        which = f" {i} of {len(rounds)}" if len(rounds) > 1 else ""
        with reporter.bar(f"Inputs of folds{which}", samples.count) as advance:

            def visit(number: str, _: Place, x: Tensor, seen: list[_Seen] = seen) -> None:
                seen[int(number)].add(x)

            watch_inputs(model, places, samples.batches, visit, advance)
        while seen:
            yield some[len(some) - len(seen)], seen.pop(0)
