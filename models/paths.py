"""Hidden states remembered from pass to pass, within a bound on their memory."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, field

from .prefix import States
from .workload import Batch, samples_in

_MAX_STRIDE = 4  # states are thinned out to every 4th border before whole batches go without


def choose_borders(
    blocks: int, batches: Sequence[Batch], state_bytes: int, cache_bytes: int
) -> range:
    """Where states are kept, so that those of two passes, or at least of one batch, fit.

    Args:
        blocks: Number of blocks.
        batches: The inputs.
        state_bytes: Bytes of one state of one sample.
        cache_bytes: The bound.
    """
    sizes = list(map(samples_in, batches))

    def fits(samples: int, stride: int) -> bool:
        return samples * (blocks // stride) * state_bytes <= cache_bytes

    stride = 1
    while not fits(max(sizes), stride) or (
        stride < _MAX_STRIDE and not fits(2 * sum(sizes), stride)
    ):
        stride *= 2
    return range(stride, blocks + 1, stride)


@dataclass(frozen=True, slots=True)
class Path:
    """The states that one way of running a model left behind on some samples.

    Attributes:
        key: What was run, one item for what comes before the first border, and so on.
        states: The states by border.
    """

    key: Sequence[Hashable] = ()
    states: States = field(default_factory=dict)

    def start(self, key: Sequence[Hashable]) -> int:
        """The border that another way can start from, since it is the same up to there."""
        pairs = enumerate(zip(self.key, key, strict=False))
        shared = next((level for level, (a, b) in pairs if a != b), len(self.key))
        return max((border for border in self.states if border <= shared), default=0)


class PathCache:
    """Remembers paths by batch, within a bound.

    Args:
        state_bytes: Bytes of one state of one sample.
        cache_bytes: Bound on all states remembered.
    """

    def __init__(self, state_bytes: int, cache_bytes: int) -> None:
        self._state_bytes, self._cache_bytes = state_bytes, cache_bytes
        self._kept: dict[int, tuple[range, list[Path]]] = {}  # by batch, last used last

    def get(self, batch: int, samples: range) -> list[Path]:
        """The paths remembered on exactly these samples of a batch."""
        span, kept = self._kept.get(batch, (range(0), []))
        return kept if span == samples else []

    def keep(self, batch: int, samples: range, paths: list[Path], busy: Collection[int]) -> None:
        """Remember paths if they fit, in place of batches that are not ``busy``."""
        self._kept.pop(batch, None)
        needed = self._bytes(samples, paths)
        for old in [other for other in self._kept if other not in busy]:
            if self.nbytes + needed > self._cache_bytes:
                del self._kept[old]
        if self.nbytes + needed <= self._cache_bytes:
            self._kept[batch] = (samples, paths)

    @property
    def nbytes(self) -> int:
        """Memory of all states remembered."""
        return sum(self._bytes(samples, paths) for samples, paths in self._kept.values())

    def _bytes(self, samples: range, paths: Sequence[Path]) -> int:
        states = {id(state) for path in paths for state in path.states.values()}  # some are shared
        return len(states) * len(samples) * self._state_bytes
