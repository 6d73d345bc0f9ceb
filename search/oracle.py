"""The model as a solver may ask it: measured KL of choices, remembered and counted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Choice = NDArray[np.intp]  # [U], the format index of every unit
# choices [B] of one format index per unit, and sequences -> KL [B, sequences], nats per token
Measure = Callable[[Sequence[Choice], range], NDArray[np.float64]]


class Oracle:
    """Measures the true KL of choices on a fixed set of sequences; the solvers' way to the model.

    Every figure is kept, in memory and as a line of ``log``, under its choice and sequence.  A
    killed search that is started again with the same seed asks the same questions and gets the
    known answers at once, so it goes on where it stopped.

    Args:
        measure: Runs the model; maps choices and sequences to KL per sequence.
        sequences: Number of sequences there are to measure on.
        length: Tokens per sequence.
        max_tokens: The work a search may spend: tokens through the model.
        log: File of known figures, one JSON line each; None keeps them in memory only.
        storage: Optuna storage URL of a black-box search; None keeps its study in memory.
        study: Name of that study.

    Attributes:
        tokens: Tokens asked for so far.  Figures of an earlier, killed run count as well, so that
            a resumed search ends where an uninterrupted one does.  A figure asked for twice in
            one search counts once.
    """

    def __init__(
        self,
        measure: Measure,
        sequences: int,
        length: int,
        *,
        max_tokens: int,
        log: Path | None = None,
        storage: str | None = None,
        study: str = "bitplan",
    ) -> None:
        self.sequences = sequences
        self.length = length
        self.max_tokens = max_tokens
        self.storage = storage
        self.study = study
        self.tokens = 0
        self._measure = measure
        self._log = log
        text = log.read_text(encoding="utf-8") if log is not None and log.is_file() else ""
        self._known = _parse(text)
        self._line_ended = not text or text.endswith("\n")  # a kill may cut the last line off
        self._asked: set[tuple[str, int]] = set()

    def spent(self, tokens: int = 0) -> bool:
        """Whether ``tokens`` more would be more work than allowed."""
        return self.tokens + tokens > self.max_tokens

    def amount(self, tokens: int) -> str:
        """Work in words: ``12,800 tokens``, or samples of a model that reads no tokens."""
        return f"{tokens:,} {'tokens' if self.length > 1 else 'samples'}"

    def kl(self, choices: Sequence[Choice], sequences: range) -> NDArray[np.float64]:
        """KL(p_original || p_choice) per choice and sequence: [B, sequences], nats per token."""
        keys = [_key(choice) for choice in choices]
        asked = {(key, i) for key in keys for i in sequences} - self._asked
        self._asked |= asked
        self.tokens += len(asked) * self.length
        todo: dict[tuple[int, ...], dict[str, Choice]] = {}
        for key, choice in zip(keys, choices, strict=True):
            missing = tuple(i for i in sequences if i not in self._known.get(key, {}))
            if missing:
                todo.setdefault(missing, {})[key] = choice
        for missing, batch in todo.items():
            for run in _runs(missing):
                found = self._measure(list(batch.values()), run)
                for key, row in zip(batch, found, strict=True):
                    self._remember(key, run, row)
        return np.array([[self._known[key][i] for i in sequences] for key in keys])

    def mean_kl(self, choice: Choice, sequences: range | None = None) -> float:
        """Mean KL of one choice over ``sequences``, all of them by default; nats per token."""
        return float(self.kl([choice], sequences or range(self.sequences)).mean())

    def _remember(self, key: str, sequences: range, kl: NDArray[np.float64]) -> None:
        self._known.setdefault(key, {}).update(zip(sequences, kl.tolist(), strict=True))
        if self._log is not None:
            line = json.dumps([key, sequences.start, kl.tolist()])
            with self._log.open("a", encoding="utf-8") as file:
                file.write(("" if self._line_ended else "\n") + line + "\n")
            self._line_ended = True


def _key(choice: Choice) -> str:
    return hashlib.sha256(choice.astype(np.int32).tobytes()).hexdigest()[:32]


def _runs(indices: tuple[int, ...]) -> list[range]:
    """Sorted indices as ranges of consecutive ones."""
    breaks = np.flatnonzero(np.diff(indices) != 1) + 1
    return [range(int(part[0]), int(part[-1]) + 1) for part in np.split(np.array(indices), breaks)]


def _parse(log: str) -> dict[str, dict[int, float]]:
    """The figures of an earlier run; a last line that was cut off is measured again."""
    known: dict[str, dict[int, float]] = {}
    for line in log.splitlines():
        try:
            key, start, kl = json.loads(line)
        except ValueError:
            continue
        known.setdefault(key, {}).update(enumerate(kl, start))
    return known
