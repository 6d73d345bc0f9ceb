"""A model's repeated blocks, and passes that start from the states an earlier pass left there.

A *border* is a number of finished blocks, 0 to n; the state at a border is the output of the last
of them.  Whoever runs a model several times on the same inputs, with other weights or another
cache from some block on, keeps states and starts there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .measure import Run
from .rendering import first_input
from .units import UnitInfo
from .workload import Batch, take

State = Any  # a block's output: the hidden state, a tuple it comes first in, or something else
States = dict[int, State]  # border -> state

_TRIAL_TOKENS = 16  # enough to see whether blocks can be skipped


def blocks_of(model: nn.Module, units: Sequence[UnitInfo]) -> dict[str, nn.Module]:
    """The repeated blocks that the units' layer numbers count, by name; none without such a stack.

    Where no unit has a layer, the model has no main stack, and is one block as a whole.
    """
    for unit in units:
        if unit.layer is not None:
            stack, _, _ = f".{unit.modules[0]}".partition(f".{unit.layer}.")
            return _children(model, stack[1:])
    return {}


def blocks_by_count(model: nn.Module, count: int) -> dict[str, nn.Module]:
    """The blocks by name in the largest list of ``count`` modules; none without such a list."""
    lists = {
        name: found
        for name, found in model.named_modules()
        if isinstance(found, nn.ModuleList) and len(found) == count
    }
    if not lists:
        return {}
    return _children(
        model, max(lists, key=lambda name: sum(p.numel() for p in lists[name].parameters()))
    )


def _children(model: nn.Module, stack: str) -> dict[str, nn.Module]:
    prefix = f"{stack}." if stack else ""
    modules = model.get_submodule(stack)._modules  # named_children leaves out repeated ones
    return {prefix + name: module for name, module in modules.items() if module is not None}


@dataclass(frozen=True, slots=True)
class Trace:
    """What one pass showed about where modules are used.

    Attributes:
        steps: Name -> the steps it is used in, in order: 0 before the first block, k in block k
            (counted from 1) or between it and the one before, n + 1 after the last.
        state_bytes: Size of the state at the last border, 0 without blocks.
    """

    steps: Mapping[str, Sequence[int]]
    state_bytes: int


class Prefix:
    """Runs a model from any border between its blocks.

    The model always runs its own forward pass, so masks, positions and the like are its own: only
    the blocks that are skipped are replaced, each by its own output where that is known and else
    by nothing.  That is right for every model whose blocks hand one hidden state on;
    :meth:`can_skip` tries it out.

    Args:
        blocks: The blocks, in the order in which they run.

    Attributes:
        blocks: The blocks; empty after :meth:`trace` or :meth:`can_skip` has found that they
            cannot be skipped, so that every pass is a full one.
    """

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        self.blocks = list(blocks)

    def trace(self, run: Run, batch: Batch, modules: Iterable[tuple[str, nn.Module]] = ()) -> Trace:
        """Run once and see where modules are used.

        The blocks are given up unless each ran once, in order.
        """
        steps: dict[str, list[int]] = {}
        states: States = {}
        order: list[int] = []
        with ExitStack() as undo:
            step = undo.enter_context(self.counted())
            for name, module in modules:

                def use(*_: Any, name: str = name) -> None:
                    steps.setdefault(name, []).append(step())

                undo.callback(module.register_forward_pre_hook(use).remove)
            for border, block in enumerate(self.blocks, 1):

                def leave(*_: Any, border: int = border) -> None:
                    order.append(border)

                undo.callback(block.register_forward_hook(leave).remove)
            for block in self.blocks[-1:]:
                undo.enter_context(_captured(block, 0, states.__setitem__))
            run(batch)
        if order != list(range(1, len(self.blocks) + 1)):
            self.blocks = []
        return Trace(steps, sum(map(_state_bytes, states.values())))

    @contextmanager
    def counted(self) -> Iterator[Callable[[], int]]:
        """Inside the block, say at which step of :attr:`Trace.steps` a single pass is."""
        started, finished = 0, 0

        def enter(*_: Any) -> None:
            nonlocal started
            started += 1

        def leave(*_: Any) -> None:
            nonlocal finished
            finished += 1

        with ExitStack() as undo:
            for block in self.blocks:
                undo.callback(block.register_forward_pre_hook(enter).remove)
                undo.callback(block.register_forward_hook(leave).remove)
            yield lambda: finished + 1 if started else 0

    def run(
        self,
        run: Run,
        batch: Batch,
        states: Mapping[int, State] | None = None,
        start: int = 0,
        keep: Collection[int] = (),
    ) -> tuple[Tensor, States]:
        """Run from a border to the logits.

        Args:
            run: Runs the model on a batch, in whatever way it is changed.
            batch: The inputs.
            states: States of the same inputs at some borders, among them ``start``.
            start: The border to start from: so many blocks are skipped.
            keep: Borders whose states are wanted.

        Returns:
            The logits, and copies of the states at those borders of ``keep`` that were passed:
            none if blocks did not run once each, in order.
        """
        found: States = {}
        passed: list[int] = []

        def capture(border: int, state: State) -> None:
            passed.append(border)
            found[border] = state

        with self._resumed(states or {}, start), ExitStack() as undo:
            for border, block in enumerate(self.blocks[start:], start + 1):
                if border in keep:
                    undo.enter_context(_captured(block, border, capture))
            logits = run(batch)
        ordered = all(a < b for a, b in pairwise(passed))
        return logits, found if ordered else {}

    def until(
        self, run: Run, batch: Batch, states: Mapping[int, State], start: int, stop: int
    ) -> State:
        """Run from one border to another and no further.

        Args:
            run: As in :meth:`run`.
            batch: The inputs.
            states: States at some borders, among them ``start`` unless that is 0.
            start: The border to start from.
            stop: The border to stop at, among the blocks there are; 0 stops before the first.

        Returns:
            The state at ``stop``, None at border 0.
        """

        def stop_before(*_: Any) -> None:
            raise _Stopped(None)

        def stop_after(_module: nn.Module, _args: Any, output: State) -> None:
            raise _Stopped(output)

        if stop:
            handle = self.blocks[stop - 1].register_forward_hook(stop_after)
        else:
            handle = self.blocks[0].register_forward_pre_hook(stop_before)
        try:
            with self._resumed(states, start):
                run(batch)
        except _Stopped as stopped:
            return stopped.state
        finally:
            handle.remove()
        raise AssertionError(f"the model never came to border {stop}")

    def can_skip(self, run: Run, batch: Batch, borders: Collection[int]) -> bool:
        """Whether the model gives the same logits started from each of its own states.

        The blocks are given up if not.
        """
        logits, states = self.run(run, batch, keep=borders)
        scale = float(logits.abs().max())
        for start in borders:
            try:
                again, _ = self.run(run, batch, {start: states[start]}, start)
            except Exception:  # whatever a model's code does with an input that was not processed
                self.blocks = []
                break
            if not torch.allclose(again, logits, rtol=0, atol=1e-6 * scale):
                self.blocks = []
                break
        return bool(self.blocks)

    @contextmanager
    def _resumed(self, states: Mapping[int, State], start: int) -> Iterator[None]:
        """Skip the blocks before a border."""
        with ExitStack() as undo:
            for border, block in enumerate(self.blocks[:start], 1):
                undo.enter_context(_skipped(block, states, border, start))
            yield


class _Stopped(Exception):
    """Ends a forward pass that has done its part."""

    def __init__(self, state: State) -> None:
        super().__init__()
        self.state = state


def trial_inputs(batch: Batch, is_text: bool) -> Batch:
    """A little of a batch for :meth:`Prefix.can_skip`: one sample, and few tokens of a text."""
    sample = take(batch, 0, 1)
    return sample[:, :_TRIAL_TOKENS] if is_text and isinstance(sample, Tensor) else sample


@contextmanager
def _skipped(
    block: nn.Module, states: Mapping[int, State], border: int, start: int
) -> Iterator[None]:
    """Let a block return its state, or its input in the structure of that at ``start``."""

    def forward(*args: Any, **kwargs: Any) -> State:
        if border in states:
            return _copied(states[border])
        state, hidden = states[start], first_input(args, kwargs).clone()
        return hidden if isinstance(state, Tensor) else (hidden, *state[1:])

    before = vars(block).get("forward")
    block.forward = forward
    try:
        yield
    finally:
        del block.forward
        if before is not None:
            block.forward = before


@contextmanager
def _captured(
    block: nn.Module, border: int, capture: Callable[[int, State], None]
) -> Iterator[None]:
    """Give a copy of a block's output to ``capture``."""
    handle = block.register_forward_hook(
        lambda _module, _args, output: capture(border, _copied(output))
    )
    try:
        yield
    finally:
        handle.remove()


def _copied(state: State) -> State:
    """A state of its own: models may change theirs in place."""
    if isinstance(state, Tensor):
        return state.clone()
    return tuple(map(_copied, state)) if type(state) is tuple else deepcopy(state)


def _state_bytes(state: State) -> int:
    parts = state if isinstance(state, tuple) else (state,)
    return sum(part.nbytes for part in parts if isinstance(part, Tensor))
