"""Wires a model to the callables that searches on true KL see: an oracle, and local prices."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from .._base.files import atomic_path
from .._base.progress import Advance, Reporter
from ..models.rendering import Renderer
from ..models.replay import Replay
from ..models.samples import Samples, calibration_samples
from ..models.workload import LoadedModel
from ..quantizers.format import Format
from ..quantizers.methods import METHODS
from ..search.oracle import Choice, Oracle
from ..sensitivity.linearize import linearize
from ..sensitivity.shrinkage import Shrinkage
from ..sensitivity.table import SensitivityTable
from .folder import RunFolder
from .settings import ProfileSettings

TOP_K = 1024  # outcomes of the original kept per position; the KL over them is 0.95 of the full
GUARD_TOKENS = 2048  # per pass; forward only, so more fit than of the profile's
_LEAST_GUARD = 8  # sequences: fewer cannot tell candidates apart


@dataclass(frozen=True, slots=True)
class StoredPrices:
    """Prices of changing one unit of a plan; see :class:`.refine.LocalPrices`."""

    first: NDArray[np.float32]
    second: NDArray[np.float64]


class Truth:
    """One model, one table and the sequences they are searched on.

    Args:
        model: The original model.
        renderer: Renders its matrices, by the table's rounding method.
        table: Its units and formats.
        samples: Calibration sequences the table was made from.
        guard: Sequences that prices never see.
        run: The run folder: every figure is kept there, so that a killed search goes on.
        seed: Seed of the probes.
        reporter: Where progress is shown.
    """

    def __init__(
        self,
        model: LoadedModel,
        renderer: Renderer,
        table: SensitivityTable,
        samples: Samples,
        guard: Samples,
        run: RunFolder,
        seed: int,
        reporter: Reporter,
    ) -> None:
        self._model, self._renderer, self._table = model, renderer, table
        self._samples, self.guard = samples, guard
        self._run, self._seed, self._reporter = run, seed, reporter
        self._formats = [Format.parse(name) for name in table.formats]

    def oracle(
        self,
        max_tokens: int,
        storage: str | None = None,
        study: str = "bitplan",
        advance: Advance | None = None,
    ) -> Oracle:
        """Measures plans on the guard sequences; figures are kept in the run folder.

        ``advance`` is told the tokens of every measurement; without it each shows a bar.
        """
        replay: Replay | None = None  # made when something is measured: it runs the model
        length = self.guard.length or 1

        def measure(choices: Sequence[Choice], sequences: range) -> NDArray[np.float64]:
            nonlocal replay
            replay = replay or Replay(
                self._model, self._renderer, self._table.units, self.guard, top_k=TOP_K
            )
            plans = [self._assignment(choice) for choice in choices]
            if advance is not None:
                found = replay.kl(plans, sequences)
                advance(len(plans) * len(sequences) * length)
                return found
            what = "1 plan" if len(plans) == 1 else f"{len(plans)} plans"
            with self._reporter.bar(f"Measuring {what}", 1) as show:
                found = replay.kl(plans, sequences)
                show(1)
            return found

        return Oracle(
            measure,
            self.guard.count,
            length,
            max_tokens=max_tokens,
            log=self._run.oracle(self._key(self.guard)),
            storage=storage,
            study=study,
        )

    def linearize(self, choice: Choice, _number: int) -> StoredPrices:
        """Local prices at a plan, from the run folder if they were computed before."""
        path = self._run.local_prices(self._key(self._samples, choice))
        try:
            return StoredPrices(**load_file(path))
        except (OSError, SafetensorError, TypeError):
            pass  # not there yet, or damaged
        with self._reporter.bar("Re-pricing at the plan", self._samples.count) as advance:
            found = linearize(
                self._model,
                self._renderer,
                self._table.units,
                self._formats,
                choice,
                self._samples,
                self._seed,
                advance,
            )
        kinds = [unit.kind for unit in self._table.units]
        second = Shrinkage(found.second, found.diagonal, kinds).prices()
        with atomic_path(path) as temporary:
            save_file({"first": found.first, "second": second}, temporary)
        return StoredPrices(found.first, second)

    def _assignment(self, choice: Choice) -> dict[str, Format]:
        return {
            name: self._formats[f]
            for unit, f in zip(self._table.units, choice.tolist(), strict=True)
            for name in unit.modules
        }

    def _key(self, samples: Samples, choice: Choice | None = None) -> str:
        """What a stored figure depends on, besides the choice in the oracle's log."""
        parts = [
            self._table.provenance.model.sha256,
            str(self._table.provenance.definition_sha256),
            self._table.provenance.rounding,
            str(TOP_K),
            version("bitplan"),
            *self._table.formats,
            *(unit.name for unit in self._table.units),
            samples.sha256,
            str(samples.count),
            str(self._seed),
        ]
        if origin := self._renderer.store.origin:
            parts.append(origin)
        digest = hashlib.sha256("\n".join(parts).encode())
        if choice is not None:
            digest.update(choice.astype(np.int32).tobytes())
        return digest.hexdigest()[:12]


def guarded(
    model: LoadedModel, settings: ProfileSettings, samples: Samples, guard: int
) -> tuple[Samples, Samples]:
    """Sequences to price local changes on, and sequences kept apart to measure them on.

    A language model draws further sequences from the calibration text, after those that prices come
    from and those that weights are rounded by; other models split the last quarter off their
    calibration batches.

    Raises:
        ValueError: If too little is left to measure on.
    """
    if model.is_language_model:
        needs_data = METHODS.trait(settings.rounding, "needs")
        further = settings.rounding_sequences if needs_data else 0
        apart = calibration_samples(
            model,
            settings.calibration,
            guard,
            settings.length,
            settings.seed,
            min(GUARD_TOKENS, 4 * settings.batch_tokens),
            settings.sequences + further,
        )
        return samples, apart
    apart = samples.tail(max(1, samples.count // 4))
    left = samples.count - apart.count
    if min(left, apart.count) < _LEAST_GUARD:
        raise ValueError(
            f"{samples.count} calibration samples are too few to search on measured KL: a quarter "
            f"of them, at least {_LEAST_GUARD}, must be kept apart. Give more batches or "
            "--refine 0 and no --tune."
        )
    return samples.head(left), apart
