"""Experts that no calibration token reached: they get the price of their kind.

A price is a mean over tokens, and no token says anything about an expert it is not sent to.  Taken
as they come, such experts would cost nothing and get the fewest bits.  Within a unit the price is
extended from the experts that were reached to all of them, in proportion to what their errors
weigh; a unit with none that was reached gets the mean price per error of the units of its kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..models.rendering import Renderer
from ..models.units import UnitInfo
from ..quantizers.format import Format
from .errors import squared_errors
from .factors import DenseGradient, Gradient, Product, absolute, gradient_norm, inner
from .uses import Uses, refuse_unreached

Values = NDArray[np.float64]


class Reach:
    """Which parts of the units, and which experts in them, had a gradient.

    Args:
        renderer: Knows the parts.
        uses: Says which of them are experts.
    """

    def __init__(self, renderer: Renderer, uses: Uses) -> None:
        self.renderer, self.uses = renderer, uses
        self._reached: dict[str, Tensor] = {}  # bool [experts] by part

    def saw(self, name: str, source: Gradient) -> None:
        """Note the gradient of a part."""
        if isinstance(source, DenseGradient) and source.blocks > 1:
            now = source.reached()
        else:
            now = torch.ones(1, dtype=torch.bool)
        before = self._reached.get(name)
        self._reached[name] = now if before is None else before | now

    def saw_all(self, name: str) -> None:
        """Note that a part, which is one expert or none, had an input."""
        self._reached[name] = torch.ones(1, dtype=torch.bool)

    def extend(
        self,
        scores: Values,
        products: Sequence[Product],
        units: Sequence[UnitInfo],
        formats: Sequence[Format],
    ) -> list[str]:
        """Extend scores [P, N, U, F] in place to the experts that were not reached.

        Returns:
            The names of those experts.

        Raises:
            ValueError: If something was not reached that is no expert, or no unit of a kind was.
        """
        names = [name for unit in units for name in unit.modules]
        missing = [n for n in names if n not in self._reached and n not in self.uses.experts]
        if missing:
            refuse_unreached(missing)
        partly = {u: self._blocks(unit) for u, unit in enumerate(units)}
        partly = {u: blocks for u, blocks in partly.items() if not all(b for *_, b in blocks)}
        unreached = []
        for u, blocks in partly.items():
            unreached += [
                name if rows is None else f"{name} expert {i}"
                for i, (name, rows, reached) in _numbered(blocks)
                if not reached
            ]
            if any(reached for *_, reached in blocks):
                whole = self._amounts(blocks, formats)
                known = self._amounts([b for b in blocks if b[2]], formats)
                for p, product in enumerate(products):
                    power, amount = _growth(product)
                    ratio = _ratio(amount(*whole), amount(*known), whole[1] / known[1])
                    scores[p, :, u] *= ratio ** (1 / power)
        alone = [u for u, blocks in partly.items() if not any(b for *_, b in blocks)]
        for u in alone:
            peers = [
                v for v, unit in enumerate(units) if unit.kind == units[u].kind and v not in alone
            ]
            if not peers:
                refuse_unreached([units[i].modules[0] for i in alone])
            mine = self._amounts(self._blocks(units[u]), formats)
            theirs = self._amounts([b for v in peers for b in self._blocks(units[v])], formats)
            for p, product in enumerate(products):
                power, amount = _growth(product)
                total = (np.abs(scores[p][:, peers]) ** power).sum(axis=1)
                ratio = _ratio(amount(*mine), amount(*theirs), mine[1] / theirs[1])
                found = (total * ratio) ** (1 / power)
                if power == 2:  # inner products: of either sign, so that none add up by themselves
                    found *= np.random.default_rng(u).choice((-1.0, 1.0), size=(len(found), 1))
                scores[p, :, u] = found
        return unreached

    def _blocks(self, unit: UnitInfo) -> list[tuple[str, Tensor | None, bool]]:
        """The experts in a unit: part, rows of it (None for all), whether it was reached."""
        blocks: list[tuple[str, Tensor | None, bool]] = []
        for part in unit.parts:
            place = self.renderer.place(part.name)
            count = 1 if part.rows else place.blocks
            reached = self._reached.get(part.name, torch.zeros(count, dtype=torch.bool))
            if count == 1 or len(reached) == 1:
                blocks.append((part.name, None, bool(reached.all())))
                continue
            rows = torch.arange(part.shape[0]).unflatten(0, (count, -1))
            blocks += [(part.name, rows[i], bool(reached[i])) for i in range(count)]
        return blocks

    def _amounts(
        self, blocks: Iterable[tuple[str, Tensor | None, bool]], formats: Sequence[Format]
    ) -> tuple[Values, float]:
        """Squared errors [F] of some experts together, and how many weights they have."""
        rows: dict[str, list[Tensor] | None] = {}
        for name, some, _ in blocks:
            if some is None:
                rows[name] = None
            else:
                known = rows.setdefault(name, [])
                assert known is not None
                known.append(some)
        errors, weights = np.zeros(len(formats)), 0.0
        for name, pieces in rows.items():
            weight = self.renderer.weight(name)
            chosen = None if pieces is None else torch.cat(pieces).to(weight.device)
            errors += squared_errors(self.renderer, name, formats, chosen)
            weights += weight.shape[1] * (weight.shape[0] if chosen is None else len(chosen))
        return errors, weights


def _numbered(
    blocks: Sequence[tuple[str, Tensor | None, bool]],
) -> Iterable[tuple[int, tuple[str, Tensor | None, bool]]]:
    """Every block with its number among those of its part."""
    counts: dict[str, int] = {}
    for block in blocks:
        counts[block[0]] = counts.get(block[0], -1) + 1
        yield counts[block[0]], block


def _ratio(value: Values, base: Values, otherwise: float) -> Values:
    """``value / base``, and the ratio of sizes where a format makes no error."""
    return np.divide(value, base, out=np.full_like(base, otherwise), where=base > 0)


_Amount = Callable[[Values, float], Values]


def _by_error(errors: Values, _weights: float) -> Values:
    return errors


_GROWTH: Mapping[Product, tuple[int, _Amount]] = {
    inner: (2, _by_error),  # its square grows with the squared error
    absolute: (1, lambda errors, weights: np.sqrt(errors * weights)),
    gradient_norm: (1, np.full_like),
}


def _growth(product: Product) -> tuple[int, _Amount]:
    """How a product grows with more weights: which power of it, and in proportion to what."""
    return _GROWTH.get(product, (1, _by_error))
