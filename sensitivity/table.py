"""The sensitivity table: what every unit costs in every format. The only thing solvers see."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from .._base.files import atomic_path, write_json
from ..models.fusion import fuse
from ..models.units import Ranges, UnitInfo
from ..quantizers.format import Format
from .provenance import Provenance
from .shrinkage import Shrinkage

SCHEMA = 2
READABLE = (1, SCHEMA)  # 1 does not say whether scores are signed


@dataclass(frozen=True, slots=True)
class SensitivityTable:
    """Units x formats: exact bytes, predicted KL increase and its standard error.

    Attributes:
        units: The U units.
        formats: Canonical names of the F candidate formats.
        bytes: int64 [U, F], ``Format.stored_bytes`` summed over a unit's matrices; of a table for
            a runtime (``Limits.for_runtime``), the bytes in that runtime's files.
        kl: float64 [U, F], predicted KL increase in nats per token; NaN = not allowed.
        stderr: float64 [U, F], standard error of ``kl`` (0 where the metric is deterministic).
        scores: float32 [N, U, F] per-sequence scores ``s`` with ``kl = mean(s**2)``, in
            sqrt(nats per token); None for metrics without samples.
        diagonal: float64 [U, F], the shape that ``kl`` was shrunk toward
            (:class:`.shrinkage.Shrinkage`), nats per token; None if ``kl`` is the plain mean.
        signed: Whether ``scores`` are inner products, which add where units are fused, or roots of
            prices, which add as squares; None where that is not known (profiles of schema 1): they
            then count as signed if any of them is negative.
        provenance: What it was made from; its JSON is taken, too.
    """

    units: tuple[UnitInfo, ...]
    formats: tuple[str, ...]
    bytes: NDArray[np.int64]
    kl: NDArray[np.float64]
    stderr: NDArray[np.float64]
    scores: NDArray[np.float32] | None = None
    diagonal: NDArray[np.float64] | None = None
    signed: bool | None = None
    provenance: Provenance = field(default_factory=Provenance)

    def __post_init__(self) -> None:
        """Check that every array has the shape the names say."""
        if not isinstance(self.provenance, Provenance):
            object.__setattr__(self, "provenance", Provenance.from_json(self.provenance))
        shape = (len(self.units), len(self.formats))
        named = {"bytes": self.bytes, "kl": self.kl, "stderr": self.stderr}
        for name, array in (named | {"diagonal": self.diagonal}).items():
            if array is not None and array.shape != shape:
                raise ValueError(f"{name} has shape {array.shape}, expected {shape}.")
        if self.scores is not None and self.scores.shape[1:] != shape:
            raise ValueError(f"scores has shape {self.scores.shape}, expected (N, {shape}).")
        if np.isnan(self.kl).all(axis=1).any():
            bad = self.units[int(np.isnan(self.kl).all(axis=1).argmax())].name
            raise ValueError(f"Unit {bad!r} has no measured format; add one it can be stored in.")

    @property
    def weights(self) -> int:
        """Number of weights in scope: the denominator of bits per weight."""
        return sum(unit.weights for unit in self.units)

    def uniform_bytes(self, fmt: str) -> int:
        """Bytes of the plan that gives every unit the format ``fmt``."""
        return int(self.bytes[:, self.formats.index(fmt)].sum())

    def merged(self, groups: Sequence[str]) -> SensitivityTable:
        """Fuse units as ``find_units`` with these ``groups`` would, without profiling again.

        Bytes add.  Signed per-sequence scores add, so that ``mean(s**2)`` keeps its cross terms,
        and are shrunk again if they were: prices equal those of a profile made with the groups.
        Unsigned scores (roots of prices) add as squares.  Without scores, prices add and standard
        errors add in quadrature.  A format that any member lacks stays NaN.

        Args:
            groups: Fusion rules such as ``q_proj,k_proj,v_proj``.  One that matches nothing, or
                only what is fused already, changes nothing.

        Raises:
            ValueError: If a rule is malformed, or its units were measured in no common format.
        """
        table = self
        for rule in groups:
            fused = fuse(table.units, rule)
            if len(fused) < len(table.units):
                table = table._with_sums(fused)
        return table

    def _with_sums(self, fused: Sequence[tuple[UnitInfo, Sequence[int]]]) -> SensitivityTable:
        """The table of units that are the sums of the named rows."""
        order = np.concatenate([members for _, members in fused])
        sizes = np.array([len(members) for _, members in fused])
        starts = np.append(0, sizes[:-1].cumsum())

        def add(values: NDArray[Any], axis: int = 0) -> NDArray[Any]:
            summed: NDArray[Any] = np.add.reduceat(values.take(order, axis), starts, axis)
            return summed

        units = tuple(unit for unit, _ in fused)
        kl, stderr = add(self.kl), np.sqrt(add(self.stderr**2))
        scores, diagonal = self.scores, self.diagonal
        if scores is not None:
            parts = scores.astype(np.float64)
            signed = bool((parts < 0).any()) if self.signed is None else self.signed
            totals = add(parts, 1) if signed else np.sqrt(add(parts**2, 1))
            # Ratios, as the mean of the squares is not always the price: negative traces count 0.
            kl *= _ratio((totals**2).mean(axis=0), add((parts**2).mean(axis=0)))
            stderr *= _ratio((totals**2).std(axis=0), np.sqrt(add((parts**2).var(axis=0))))
            scores = totals.astype(np.float32)
            if diagonal is not None:
                diagonal = add(diagonal)
                shrinkage = Shrinkage(scores, diagonal, [unit.kind for unit in units])
                kl = np.where(np.isnan(kl), kl, shrinkage.prices())
                stderr = np.where(np.isnan(kl), stderr, shrinkage.stderr())
        return replace(
            self,
            units=units,
            bytes=add(self.bytes),
            kl=kl,
            stderr=stderr,
            scores=scores,
            diagonal=diagonal,
        )

    def save(self, path: Path) -> None:
        """Write ``path`` (safetensors, self-contained) and a readable ``.json`` beside it."""
        tensors: dict[str, NDArray[Any]] = {
            "bytes": self.bytes,
            "kl": self.kl,
            "stderr": self.stderr,
        }
        if self.scores is not None:
            tensors["scores"] = self.scores
        if self.diagonal is not None:
            tensors["diagonal"] = self.diagonal
        header = {
            "schema": SCHEMA,
            "units": [_unit_json(unit) for unit in self.units],
            "formats": list(self.formats),
            "signed": self.signed,
            "provenance": self.provenance.to_json(),
        }
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata={"bitplan_profile": json.dumps(header)})
        write_json(path.with_suffix(".json"), header)

    @classmethod
    def load(cls, path: Path) -> SensitivityTable:
        """Read a profile written by :meth:`save`.

        Raises:
            ValueError: If the file is missing, truncated, or not a bitplan profile.
        """
        if not path.is_file():
            raise ValueError(f"No profile at {path}. Make one with `bitplan profile MODEL`.")
        if path.suffix == ".json":
            raise ValueError(f"{path} is not a profile; give the profile.safetensors of a run.")
        try:
            with safe_open(str(path), framework="numpy") as file:
                header = json.loads((file.metadata() or {})["bitplan_profile"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(
                f"{path} is truncated or not a safetensors file ({error}). Profile again."
            ) from error
        except KeyError as error:
            raise ValueError(f"{path} is a safetensors file but not a bitplan profile.") from error
        except json.JSONDecodeError as error:
            raise ValueError(
                f"The header of {path} is damaged ({error}). Profile again."
            ) from error
        if header.get("schema") not in READABLE:
            known = " and ".join(map(str, READABLE))
            raise ValueError(
                f"{path} has profile schema {header.get('schema')}, this version reads {known}. "
                "Profile again, or use the bitplan version that wrote it."
            )
        try:
            table = cls(
                units=tuple(_unit(entry) for entry in header["units"]),
                formats=tuple(header["formats"]),
                bytes=tensors["bytes"],
                kl=tensors["kl"],
                stderr=tensors["stderr"],
                scores=tensors.get("scores"),
                diagonal=tensors.get("diagonal"),
                signed=header.get("signed"),
                provenance=Provenance.from_json(header["provenance"]),
            )
            table.check_consistent()
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error}). Profile again.") from error
        return table

    def check_consistent(self) -> None:
        """Raise if the bytes are not those of the formats, or a price is no price.

        Raises:
            ValueError: Names the first unit and format that is wrong.
        """
        exact = stored_bytes(self.units, [Format.parse(name) for name in self.formats])
        priced = ~np.isnan(self.kl)
        sound = np.isfinite(self.kl) & (self.kl >= 0) & (self.stderr >= 0)
        wrong = (self.bytes != exact) | (priced & ~sound)
        if wrong.any():
            u, f = (int(i) for i in np.argwhere(wrong)[0])
            raise ValueError(
                f"unit {self.units[u].name!r} in {self.formats[f]} has {self.bytes[u, f]} B and KL "
                f"{self.kl[u, f]} ± {self.stderr[u, f]}, but takes {exact[u, f]} B"
            )


def stored_bytes(
    units: Sequence[UnitInfo],
    formats: Sequence[Format],
    count: Callable[[Format, tuple[int, int]], int] = Format.stored_bytes,
) -> NDArray[np.int64]:
    """Exact bytes of every unit in every format: int64 [U, F].

    Args:
        units: The units; those of the same shapes are counted once.
        formats: The formats.
        count: Counts the bytes of a matrix [rows, cols] in a format.
    """
    rows = {
        shapes: [sum(count(fmt, shape) for shape in shapes) for fmt in formats]
        for shapes in {unit.shapes for unit in units}
    }
    return np.array([rows[unit.shapes] for unit in units], dtype=np.int64)


def _ratio(value: NDArray[np.float64], base: NDArray[np.float64]) -> NDArray[np.float64]:
    """``value / base``, and 1 where the base is zero."""
    return np.divide(value, base, out=np.ones_like(base), where=base > 0)


def _unit_json(unit: UnitInfo) -> dict[str, Any]:
    """A unit as JSON; ``rows`` is there only for one that has some rows of a matrix, not all."""
    entry = asdict(unit)
    if not unit.rows:
        del entry["rows"]
    return entry


def _unit(entry: dict[str, Any]) -> UnitInfo:
    return UnitInfo(
        name=entry["name"],
        modules=tuple(entry["modules"]),
        shapes=tuple((int(rows), int(cols)) for rows, cols in entry["shapes"]),
        kind=entry["kind"],
        layer=entry["layer"],
        aliases=tuple(entry["aliases"]),
        rows=tuple(_ranges(some) for some in entry.get("rows", ())),
    )


def _ranges(some: list[list[int]] | None) -> Ranges | None:
    return None if some is None else tuple((int(start), int(stop)) for start, stop in some)
