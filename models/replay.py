"""True KL of many plans on the same sequences, re-running only what differs between plans."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .rendering import Assignment, Renderer, first_input
from .samples import Samples
from .topk import TopK
from .units import UnitInfo
from .workload import Batch, LoadedModel, samples_in

State = Tensor | tuple[Any, ...]  # a block's output: the hidden state, or a tuple it comes first in
Key = tuple[tuple[str, ...], ...]  # the formats of a plan, one tuple per level

_TRIAL_TOKENS = 16  # enough to see whether blocks can be skipped
_MAX_STRIDE = 4  # states are thinned out to every 4th block before whole batches go without


@dataclass(frozen=True, slots=True)
class _Path:
    """The hidden states one plan left behind on some sequences.

    Attributes:
        key: The plan's formats by level.
        states: Number of finished blocks -> output of the last of them.
    """

    key: Key = ()
    states: dict[int, State] = field(default_factory=dict)

    def start(self, key: Key) -> int:
        """How many blocks another plan can skip because it has the same formats there."""
        pairs = enumerate(zip(self.key, key, strict=False))
        shared = next((level for level, (a, b) in pairs if a != b), len(self.key))
        return max((done for done in self.states if done <= shared), default=0)


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
      hidden states the earlier one left there.  The model still runs its own forward pass, so
      masks, positions and the like are its own: only the skipped blocks are replaced, the last
      of them by its known output and those before by nothing.  Whether a model's blocks can be
      skipped like this is tried out on one sequence; if not, every pass is a full one.

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
        self._kept: dict[int, tuple[range, list[_Path]]] = {}  # by batch, last used last
        sample = _take(samples.batches[0], 0, 1)
        with torch.no_grad():
            self._blocks = _find_blocks(model.module, units)
            levels = self._trace(sample, units)
            self._boundaries = self._choose_boundaries()
            if isinstance(sample, Tensor) and model.is_language_model:
                sample = sample[:, :_TRIAL_TOKENS]
            if not self._can_skip(sample):
                self._blocks, self._boundaries = [], range(0)
        self._levels: list[list[str]] = [[] for _ in range(len(self._blocks) + 1)]
        for name, level in levels.items():
            self._levels[min(level, len(self._blocks))].append(name)

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
                span, kept = self._kept.get(piece.batch, (range(0), []))
                known = kept if span == piece.sequences else []
                closest = sorted(known, key=lambda path: -path.start(keys[0]))[:1]
                latest, first = _Path(), list[_Path]()
                for i in order:
                    base = max([*known, latest], key=lambda path: path.start(keys[i]))
                    logits, latest = self._run(piece, assignments[i], keys[i], base)
                    result[i, columns] = reference.kl(logits).cpu().numpy()
                    if i == 0:
                        first = [latest]
                self._keep(piece, [*closest, *first], {other.batch for other in pieces})
        return result

    def _run(
        self, piece: _Piece, assignment: Assignment, key: Key, base: _Path
    ) -> tuple[Tensor, _Path]:
        start = base.start(key)
        self.blocks_run += (len(self._blocks) - start) * len(piece.sequences)
        self.blocks_saved += start * len(piece.sequences)
        with self._renderer.applied(assignment):
            logits, states = self._forward(piece.inputs, base.states, start, self._boundaries)
        return logits, _Path(key, states)

    def _forward(
        self, inputs: Batch, states: Mapping[int, State], start: int, keep: Collection[int]
    ) -> tuple[Tensor, dict[int, State]]:
        """Run the model from block ``start`` on; also return the states at ``keep``."""
        found = {done: state for done, state in states.items() if done <= start}
        with ExitStack() as undo:
            for done, block in enumerate(self._blocks, 1):
                if done <= start:
                    undo.enter_context(_skipped(block, states[start], done == start))
                elif done in keep:
                    undo.enter_context(_captured(block, done, found))
            return self._model.logits(inputs), found

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
                yield _Piece(index, first + low, _take(batch, low, high))
            first += size

    def _reference_of(self, piece: _Piece) -> TopK:
        """The original's distribution on a piece, computed when first asked for."""
        if any(i not in self._reference for i in piece.sequences):
            fresh = TopK.of(self._model.logits(piece.inputs), self._top_k).samples()
            self._reference.update(zip(piece.sequences, fresh, strict=True))
        return TopK.stack([self._reference[i] for i in piece.sequences])

    def _keep(self, piece: _Piece, paths: list[_Path], busy: set[int]) -> None:
        """Remember paths if they fit, in place of batches that the call does not use."""
        self._kept.pop(piece.batch, None)
        needed = self._bytes(piece.sequences, paths)
        for old in [batch for batch in self._kept if batch not in busy]:
            if self.cached_bytes + needed > self._cache_bytes:
                del self._kept[old]
        if self.cached_bytes + needed <= self._cache_bytes:
            self._kept[piece.batch] = (piece.sequences, paths)

    @property
    def cached_bytes(self) -> int:
        """Memory of the hidden states remembered for the next call."""
        return sum(self._bytes(span, paths) for span, paths in self._kept.values())

    def _bytes(self, sequences: range, paths: Sequence[_Path]) -> int:
        states = {id(state) for path in paths for state in path.states.values()}  # some are shared
        return len(states) * len(sequences) * self._state_bytes

    def _trace(self, sample: Batch, units: Sequence[UnitInfo]) -> dict[str, int]:
        """Run the original and find each matrix's level: how many blocks precede its first use.

        The blocks are forgotten unless each ran once, in order.
        """
        finished: list[nn.Module] = []
        levels: dict[str, int] = {}
        states: dict[int, State] = {}
        with ExitStack() as undo:
            for name, module in self._renderer.hooked_modules():

                def use(*_: Any, name: str = name) -> None:
                    levels.setdefault(name, len(finished))

                undo.callback(module.register_forward_pre_hook(use).remove)
            for block in self._blocks:
                hook = block.register_forward_hook(lambda module, *_: finished.append(module))
                undo.callback(hook.remove)
            for block in self._blocks[-1:]:
                undo.enter_context(_captured(block, 0, states))
            self._model.logits(sample)
        if finished != self._blocks:
            self._blocks = []
        self._state_bytes = sum(map(_state_bytes, states.values()))
        # A matrix that one sequence does not use, such as an expert's, is at least in its block.
        return {name: unit.layer or 0 for unit in units for name in unit.modules} | levels

    def _choose_boundaries(self) -> range:
        """After how many finished blocks the hidden state is kept, so that it fits."""
        blocks = len(self._blocks)
        largest = max(map(samples_in, self._samples.batches))

        def fits(sequences: int, stride: int) -> bool:
            return sequences * (blocks // stride) * self._state_bytes <= self._cache_bytes

        stride = 1
        while not fits(largest, stride) or (
            stride < _MAX_STRIDE and not fits(2 * self._samples.count, stride)
        ):
            stride *= 2
        return range(stride, blocks + 1, stride)

    def _can_skip(self, sample: Batch) -> bool:
        """Whether the original gives the same logits started from each of its own states."""
        logits, states = self._forward(sample, {}, 0, self._boundaries)
        scale = float(logits.abs().max())
        for start in self._boundaries:
            try:
                again, _ = self._forward(sample, states, start, ())
            except Exception:  # whatever a model's code does with an input that was not processed
                return False
            if not torch.allclose(again, logits, rtol=0, atol=1e-6 * scale):
                return False
        return True


def _find_blocks(model: nn.Module, units: Sequence[UnitInfo]) -> list[nn.Module]:
    """The repeated blocks that the units' layer numbers count; none if there is no such stack."""
    for unit in units:
        if unit.layer is not None:
            stack, _, _ = f".{unit.modules[0]}".partition(f".{unit.layer}.")
            return list(model.get_submodule(stack[1:]).children())
    return []


@contextmanager
def _skipped(block: nn.Module, state: State, is_last: bool) -> Iterator[None]:
    """Let a block return ``state``, or its input in the same structure if it is not the last."""

    def forward(*args: Any, **kwargs: Any) -> State:
        return _with_hidden(state, (_hidden(state) if is_last else first_input(args, kwargs)))

    before = block.__dict__.get("forward")
    block.forward = forward
    try:
        yield
    finally:
        del block.forward
        if before is not None:
            block.forward = before


@contextmanager
def _captured(block: nn.Module, done: int, states: dict[int, State]) -> Iterator[None]:
    """Put a block's output into ``states[done]``; the model goes on with a copy."""

    def capture(_module: nn.Module, _args: Any, output: Any) -> Any:
        states[done] = output
        return _with_hidden(output, _hidden(output)) if _is_state(output) else output

    handle = block.register_forward_hook(capture)
    try:
        yield
    finally:
        handle.remove()


def _is_state(output: Any) -> bool:
    return isinstance(_hidden(output), Tensor)


def _hidden(state: Any) -> Any:
    return state[0] if type(state) is tuple and state else state


def _with_hidden(state: State, hidden: Tensor) -> State:
    """A state with a copy of ``hidden``: models may change their hidden state in place."""
    return hidden.clone() if isinstance(state, Tensor) else (hidden.clone(), *state[1:])


def _state_bytes(state: State) -> int:
    parts = state if isinstance(state, tuple) else (state,)
    return sum(part.nbytes for part in parts if isinstance(part, Tensor))


def _take(batch: Batch, low: int, high: int) -> Batch:
    """Some samples of a batch."""

    def take(value: Any) -> Any:
        return value[low:high] if isinstance(value, Tensor) else value

    if isinstance(batch, Tensor):
        return batch[low:high]
    if isinstance(batch, Mapping):
        return {key: take(value) for key, value in batch.items()}
    return tuple(take(value) for value in batch)
