"""Sums of curvature in files, and the evidence that is made of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .._base.files import atomic_path
from .curvature import Sums

FORMS = ("sequence", "token", "plain")


@dataclass(frozen=True)
class Fold:
    """Sums over some of the sequences, as they are kept: see :func:`halved`.

    Attributes:
        tokens: How many tokens they have.
        vectors: How many vectors the matrix multiplied.
        rows: See :class:`Sums`.
        forms: See :class:`Sums`; what a gradient without factors lacks is not there.
    """

    tokens: int
    vectors: int
    rows: Tensor
    forms: Mapping[str, Tensor]

    def __add__(self, other: Fold) -> Fold:
        """The sums over the sequences of both."""
        forms = {name: form + other.forms[name] for name, form in self.forms.items()}
        counts = self.tokens + other.tokens, self.vectors + other.vectors
        return Fold(*counts, self.rows + other.rows, forms)

    def part(self, number: int) -> Fold:
        """The sums of one of the equal blocks that the rows divide into."""
        forms = {name: form[number : number + 1] for name, form in self.forms.items()}
        rows = self.rows.chunk(len(self.forms["sequence"]))[number]
        return replace(self, rows=rows, forms=forms)

    def relative_rows(self) -> Tensor:
        """What an error in a row costs relative to the mean row of its block, float32 [rows]."""
        blocks = self.rows.unflatten(0, (len(self.forms["sequence"]), -1))
        mean = blocks.mean(1, keepdim=True)
        return torch.where(mean > 0, blocks / torch.where(mean > 0, mean, 1), 1).flatten()

    def hessian(self) -> Tensor | None:
        """The mean of x x^T [cols, cols] or [parts, cols, cols]; None without factors."""
        if "plain" not in self.forms:
            return None
        whole = restored(self.forms["plain"]).div_(max(self.vectors, 1))
        return whole[0] if len(whole) == 1 else whole

    def fisher(self, token: float = 0.0, plain: float = 0.0) -> Tensor:
        """What an error in a row costs, mean over the rows, float32 [parts, cols, cols].

        Args:
            token: How much of the token form to mix in for one of the sequence form, both at the
                same mean diagonal, which the mixture has as well.
            plain: How much of the plain form; without one, how much of the sequence form's own
                diagonal.
        """
        base = self.forms["sequence"]
        mixed, level, weight = base, mean_diagonal(base), 1.0
        for name, share in (("token", token), ("plain", plain)):
            if not share:
                continue
            if name in self.forms:
                other = self.forms[name]
                mean = mean_diagonal(other)
                factor = share * torch.where(mean > 0, level / torch.where(mean > 0, mean, 1), 0)
                mixed = torch.addcmul(mixed, other, factor[:, None, None])
                weight += share
        whole = restored(mixed)
        if plain and "plain" not in self.forms:
            diagonal = whole.diagonal(dim1=-2, dim2=-1)
            whole = whole / (1 + plain)
            whole.diagonal(dim1=-2, dim2=-1).add_(plain / (1 + plain) * diagonal)
        count = self.tokens * (len(self.rows) // len(base))
        return whole.div_(weight * max(count, 1))


class _About(NamedTuple):
    """What a file says of itself: tokens and vectors by fold, and whether gradients reached it."""

    tokens: list[int]
    vectors: list[int]
    reached: bool


class Kept:
    """Sums of matrices in files, one for each, from which evidence is made when it is asked for.

    Args:
        folder: Where they are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[str, _About] = {}

    def folds(self, name: str) -> int:
        """How many folds of a matrix there are; 0 if there is no file, or a damaged one."""
        about = self._about(name)
        return len(about.tokens) if about else 0

    def reached(self, name: str) -> bool:
        """Whether a matrix had any gradient."""
        about = self._about(name)
        return about is not None and about.reached

    def write(self, name: str, tokens: Sequence[int], folds: Sequence[Sums]) -> None:
        """Keep the sums of a matrix, fold by fold, with the tokens of each.

        Raises:
            ValueError: If they are not finite.
        """
        tensors = {}
        for i, sums in enumerate(folds):
            tensors[f"{i}.rows"] = sums.rows
            for form, triangle in sums.forms.items():
                tensors[f"{i}.{form}"] = half = halved(triangle.square())
                if not half.isfinite().all():
                    raise ValueError(
                        f"The gradient of {name!r} has NaN or Inf on the calibration data, or "
                        f"values whose squares overflow. Leave it out with --exclude {name!r}."
                    )
        about = {
            "name": name,
            "tokens": " ".join(map(str, tokens)),
            "vectors": " ".join(str(sums.vectors) for sums in folds),
            "reached": str(int(any(sums.rows.any() for sums in folds))),
        }
        with atomic_path(self._path(name)) as temporary:
            save_file(tensors, temporary, about)
        self._known.pop(name, None)

    def read(self, name: str, device: torch.device, fold: int | None = None) -> Fold:
        """The sums of one fold of a matrix, or of all together."""
        about = self._about(name)
        assert about is not None, f"there are no sums of {name}"
        with safe_open(self._path(name), framework="pt") as file:
            names = set(file.keys())

            def one(i: int) -> Fold:
                forms = {
                    form: file.get_tensor(key).to(device)
                    for form in FORMS
                    if (key := f"{i}.{form}") in names
                }
                rows = file.get_tensor(f"{i}.rows").to(device)
                return Fold(about.tokens[i], about.vectors[i], rows, forms)

            if fold is not None:
                return one(fold)
            total = one(0)
            for i in range(1, len(about.tokens)):
                total += one(i)
            return total

    def _about(self, name: str) -> _About | None:
        if name not in self._known:
            try:
                with safe_open(self._path(name), framework="pt") as file:
                    said = file.metadata()
                counts = [[int(n) for n in said[key].split()] for key in ("tokens", "vectors")]
                self._known[name] = _About(counts[0], counts[1], said["reached"] == "1")
            except (OSError, SafetensorError, KeyError, TypeError, ValueError):
                return None
        return self._known[name]

    def _path(self, name: str) -> Path:
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.safetensors"


def halved(square: Tensor) -> Tensor:
    """The lower triangles of matrices [parts, n, n] as [parts, n + 1, ceil(n / 2)].

    Below the diagonal lie the first half of the columns, above it the rest, transposed.
    """
    parts, n, _ = square.shape
    h = (n + 1) // 2
    out = square.new_zeros(parts, n + 1, h)
    out[:, 1:] = square[:, :, :h].tril()
    out[:, : n - h, : n - h] += square[:, h:, h:].tril().mT
    return out


def restored(half: Tensor) -> Tensor:
    """Symmetric matrices [parts, n, n] of which :func:`halved` kept the lower triangles.

    >>> square = torch.tensor([[[1.0, 2, 4], [2, 3, 5], [4, 5, 6]]])
    >>> half = halved(square)
    >>> half.shape, torch.equal(restored(half), square)
    (torch.Size([1, 4, 2]), True)
    """
    parts, n, h = half.shape[0], half.shape[1] - 1, half.shape[2]
    lower = half.new_zeros(parts, n, n)
    lower[:, :, :h] = half[:, 1:].tril()
    lower[:, h:, h:] = half[:, : n - h, : n - h].triu().mT
    return lower.add_(lower.tril(-1).mT)


def mean_diagonal(half: Tensor) -> Tensor:
    """Of matrices as :func:`halved` keeps them, [parts]."""
    n = half.shape[1] - 1
    rest = half.diagonal(dim1=1, dim2=2)[:, : n - half.shape[2]]
    return (half.diagonal(-1, 1, 2).sum(1) + rest.sum(1)) / n
