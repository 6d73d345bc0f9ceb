"""True KL of many plans on the same sequences, re-running only what differs between plans."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .paths import Path, PathCache, choose_borders
from .prefix import Prefix, blocks_of, trial_inputs
from .rendering import Assignment, Renderer
from .samples import Samples
from .topk import TopK
from .units import UnitInfo
from .workload import Batch, LoadedModel, samples_in, take

Key = tuple[tuple[str, ...], ...]  # the formats of a plan, one tuple per level


@dataclass(frozen=True, slots=True)
class _Piece:
    """Consecutive sequences of one batch."""

    batch: int  # index of the batch
    first: int  # number of its first sequence among all
    inputs: Batch

    @property
    def sequences(self) -> range:
        return range(self.first, self.first + samples_in(self.inputs))


class Replay:
    """Measures KL(p_original || p_plan) of plans, with what they have in common run only once.

    Two economies make a measurement cheap:

    * The original runs once per sequence, when first needed; only its ``top_k`` likeliest classes
      per position and the rest's mass are kept.  The KL over these top_k + 1 outcomes is a lower
      bound on the full KL (data-processing inequality), exact when ``top_k`` is at least the
      number of classes.  With 256 of 49,152 classes, SmolLM2 shows 0.85 (int5) to 0.90 (int3) of
      the full KL: compare plans of similar KL with it, and report the full one.
    * A plan that has the same formats as an earlier one up to block b starts at block b, from the
      hidden states the earlier one left there (:class:`.prefix.Prefix`).  Whether a model's
      blocks can be skipped like this is tried out on one sequence; if not, every pass is a full
      one.

    Within a call, plans are sorted so that every prefix of blocks they share is run once per
    batch.  From call to call the paths of two plans are remembered: the first of the last call,
    and the one it shared most with, so that neither a rejected proposal nor an accepted one costs
    the next call its start.  Give the plan that others will be derived from first.

    Args:
        model: The original model.
        renderer: Renders the plans' weights.
        units: The units, which tell where the repeated blocks are.
        samples: The sequences.
        top_k: Classes kept per position.
        cache_bytes: Bound on the hidden states remembered from call to call, and on those of one
            plan on the batch at hand.

    Attributes:
        blocks_run: Blocks evaluated for plans so far, times sequences.
        blocks_saved: Blocks skipped so far, times sequences.

    Raises:
        ValueError: If ``top_k`` is less than 1.

    References:
        EvoPress, Sieberling et al. (2024): true KL as the fitness of a plan.
    """

    def __init__(
        self,
        model: LoadedModel,
        renderer: Renderer,
        units: Sequence[UnitInfo],
        samples: Samples,
        *,
        top_k: int = 256,
        cache_bytes: int = 1 << 30,
    ) -> None:
        if top_k < 1:
            raise ValueError(f"top_k is {top_k}; keep at least 1 class per position.")
        self.blocks_run = 0
        self.blocks_saved = 0
        self._model, self._renderer, self._samples = model, renderer, samples
        self._top_k, self._cache_bytes = top_k, cache_bytes
        self._reference: dict[int, TopK] = {}
        sample = take(samples.batches[0], 0, 1)
        with torch.no_grad():
            self._prefix = Prefix(blocks_of(model.module, units).values())
            trace = self._prefix.trace(model.logits, sample, renderer.hooked_modules())
            blocks, size = len(self._prefix.blocks), trace.state_bytes
            self._borders = choose_borders(blocks, samples.batches, size, cache_bytes)
            trial = trial_inputs(sample, model.is_language_model)
            if not self._prefix.can_skip(model.logits, trial, self._borders):
                self._borders = range(0)
        self._blocks = len(self._prefix.blocks)
        self._cache = PathCache(size, cache_bytes)
        # A matrix that one sequence does not use, such as an expert's, is at least in its block.
        levels = {name: unit.layer or 0 for unit in units for name in unit.modules}
        levels |= {name: max(steps[0] - 1, 0) for name, steps in trace.steps.items()}
        self._levels: list[list[str]] = [[] for _ in range(self._blocks + 1)]
        for name, level in levels.items():
            self._levels[min(level, self._blocks)].append(name)

    def kl(self, assignments: Sequence[Assignment], sequences: range) -> NDArray[np.float64]:
        """KL(p_original || p_plan) per plan and sequence, over the ``top_k`` + 1 outcomes.

        Args:
            assignments: B plans; a matrix they do not name stays original.
            sequences: Which of the samples, counted through the batches.

        Returns:
            float64 [B, sequences], nats per token, mean over the tokens of a sequence.

        Raises:
            ValueError: If there is no such sequence, or no such matrix.
        """
        keys = [self._key(assignment) for assignment in assignments]
        order = sorted(range(len(keys)), key=keys.__getitem__)
        result = np.empty((len(keys), len(sequences)))
        pieces = list(self._pieces(sequences)) if keys else []
        with torch.no_grad():
            for piece in pieces:
                columns = [i - sequences.start for i in piece.sequences]
                reference = self._reference_of(piece)
                known = self._cache.get(piece.batch, piece.sequences)
                closest = sorted(known, key=lambda path: -path.start(keys[0]))[:1]
                latest, first = Path(), list[Path]()
                for i in order:
                    base = max([*known, latest], key=lambda path: path.start(keys[i]))
                    logits, latest = self._run(piece, assignments[i], keys[i], base)
                    result[i, columns] = reference.kl(logits).cpu().numpy()
                    if i == 0:
                        first = [latest]
                busy = {other.batch for other in pieces}
                self._cache.keep(piece.batch, piece.sequences, [*closest, *first], busy)
        return result

    @property
    def cached_bytes(self) -> int:
        """Memory of the hidden states remembered for the next call."""
        return self._cache.nbytes

    def _run(
        self, piece: _Piece, assignment: Assignment, key: Key, base: Path
    ) -> tuple[Tensor, Path]:
        start = base.start(key)
        self.blocks_run += (self._blocks - start) * len(piece.sequences)
        self.blocks_saved += start * len(piece.sequences)
        shared = {border: state for border, state in base.states.items() if border <= start}
        here = {start: shared[start]} if start else {}
        with self._renderer.applied(assignment):
            logits, states = self._prefix.run(
                self._model.logits, piece.inputs, here, start, self._borders
            )
        return logits, Path(key, shared | states)

    def _key(self, assignment: Assignment) -> Key:
        unknown = set(assignment).difference(*self._levels)
        if unknown:
            raise ValueError(
                f"The plan names {sorted(unknown)[0]!r}, which is no matrix of the units. Use the "
                f"canonical names, such as {self._renderer.names[0]!r}."
            )
        return tuple(
            tuple(assignment[name].name if name in assignment else "" for name in names)
            for names in self._levels
        )

    def _pieces(self, sequences: range) -> Iterator[_Piece]:
        """Cut a range of sequences at the borders of the batches."""
        count = self._samples.count
        if sequences.step != 1 or sequences.start < 0 or sequences.stop > count:
            raise ValueError(f"{sequences} is not a range of the {count} sequences there are.")
        first = 0
        for index, batch in enumerate(self._samples.batches):
            size = samples_in(batch)
            low, high = max(sequences.start - first, 0), min(sequences.stop - first, size)
            if low < high:
                yield _Piece(index, first + low, take(batch, low, high))
            first += size

    def _reference_of(self, piece: _Piece) -> TopK:
        """The original's distribution on a piece, computed when first asked for."""
        if any(i not in self._reference for i in piece.sequences):
            fresh = TopK.of(self._model.logits(piece.inputs), self._top_k).samples()
            self._reference.update(zip(piece.sequences, fresh, strict=True))
        return TopK.stack([self._reference[i] for i in piece.sequences])
