"""Which units a name or glob means, and which column of a table a format is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import translate

import numpy as np
from numpy.typing import NDArray

from .._base.hints import did_you_mean, propose
from ..models.units import UnitInfo, module_kinds
from ..quantizers.format import resolve_formats
from ..sensitivity.table import SensitivityTable


class Names:
    """Finds rows by any of their names.

    Args:
        rows: The names of every row.
    """

    def __init__(self, rows: Sequence[Iterable[str]]) -> None:
        self._count = len(rows)
        self._rows: dict[str, list[int]] = {}
        for i, names in enumerate(rows):
            for name in names:
                self._rows.setdefault(name, []).append(i)

    def find(self, glob: str, limit: str) -> NDArray[np.bool_]:
        """bool [rows], those with a name that equals or matches ``glob`` (case matters).

        Args:
            glob: Name or glob.
            limit: What the glob belongs to, for the error: ``--pin``.

        Raises:
            ValueError: If no row does.
        """
        match = re.compile(translate(glob)).match
        found = self.exact(glob)
        found[[i for name, rows in self._rows.items() if match(name) for i in rows]] = True
        if not found.any():
            raise ValueError(
                f"{limit} {glob!r} matches no unit or module."
                + (nearest(glob, self._rows) or f" One is called {next(iter(self._rows))!r}.")
            )
        return found

    def exact(self, name: str) -> NDArray[np.bool_]:
        """bool [rows], those with this very name."""
        found = np.zeros(self._count, dtype=bool)
        found[self._rows.get(name, [])] = True
        return found


def unit_names(units: Sequence[UnitInfo]) -> Names:
    """Units by unit, module or alias name, or by kind (``mlp.up_proj``: that of every layer)."""
    return Names([(u.name, *u.modules, *u.aliases, u.kind, *module_kinds(u)) for u in units])


def format_index(table: SensitivityTable, name: str) -> int:
    """The column of a format; ``keep`` is the checkpoint's own dtype.

    Raises:
        ValueError: If the table has no such format.
    """
    if name == "keep":
        name = _kept_format(table)
    if name not in table.formats:
        raise ValueError(
            f"Format {name!r} is not in the profile.{nearest(name, table.formats)} "
            f"It has {', '.join(table.formats)}."
        )
    return table.formats.index(name)


def _kept_format(table: SensitivityTable) -> str:
    """The format of the checkpoint's own dtype, which must be among the table's."""
    dtype = table.provenance.dtype
    if dtype is None:
        raise ValueError(
            "'keep' means the checkpoint's own dtype, which this profile does not record. Name "
            f"one of its formats ({', '.join(table.formats)}), or profile again with 'keep' among "
            "--formats."
        )
    kept = resolve_formats(["keep"], dtype)[0].name
    if kept not in table.formats:
        raise ValueError(
            f"'keep' means {kept!r} for this model, which is not in the profile (it has "
            f"{', '.join(table.formats)}). Profile again with {kept!r} added to --formats."
        )
    return kept


def nearest(name: str, names: Iterable[str]) -> str:
    """`` Did you mean 'a' or 'b'?``, or nothing if no name comes near."""
    known = list(dict.fromkeys(names))
    close = [other for other in known if name and other.startswith(name)][:3]
    return propose(close) or did_you_mean(name, known, count=3, cutoff=0.3)
