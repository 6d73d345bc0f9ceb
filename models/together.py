"""Several plans through one forward pass, block by block: each block is read once for all."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from .._base.memory import give_back
from .blockwise import Progress, block_there, blocks_agree, segment, trials_of
from .borders import Borders, joined_state
from .measure import Chooser, Measurement, Tally, labels_in, measure, plan_runner
from .prefix import Prefix, blocks_of
from .rendering import Assignment, Renderer
from .samples import Samples
from .workload import Batch, LoadedModel, samples_in

FIRST = 16  # sequences after which candidates may be left out

Plans = Mapping[str, tuple[Renderer, Assignment]]


def measure_together(
    model: LoadedModel,
    plans: Plans,
    samples: Samples,
    advance: Callable[[], None] = lambda: None,
    keep: Chooser | None = None,
) -> tuple[dict[str, Measurement], float | None]:
    """:func:`.measure.measure` block by block, with hidden states of the original and every plan.

    A block's original weights are made once, and what a plan renders of it once for all batches;
    but of what comes after the blocks, such as the head, a plan renders once per batch.
    Candidates are left out after the first batches only.  A model that cannot be run from between
    its blocks is measured batch by batch.

    Args:
        model: The original model.
        plans: Name -> renderer and formats.
        samples: Held-out batches.
        advance: Called (1 + plans) times per batch in all.
        keep: Asked after some batches which candidates to go on with.

    Returns:
        Measurements by name, and the perplexity of the original (None without text).
    """
    prefix = _prefix(model, plans, samples)
    if not prefix.blocks:
        runs = {name: plan_runner(model, *plan) for name, plan in plans.items()}
        return measure(model, runs, samples, advance, keep=keep)
    tally = Tally(plans)
    left: Collection[str] = plans
    rounds = _rounds(samples.batches) if keep is not None else [samples.batches]

    def several(count: int) -> None:
        for _ in range(count):
            advance()

    with torch.no_grad():
        for batches in rounds:
            steps = len(batches) * (1 + len(plans))
            done = Progress(several, steps)
            some = {name: plan for name, plan in plans.items() if name in left}
            _through(model, prefix, some, batches, tally, done)
            done.to(1)
            if keep is not None:
                left = keep(tally.kl(left))
    return tally.result()


def _through(
    model: LoadedModel,
    prefix: Prefix,
    plans: Plans,
    batches: Sequence[Batch],
    tally: Tally,
    done: Progress,
) -> None:
    """Take some batches through all blocks, as the original has them and as every plan has."""
    borders, last = Borders(), len(prefix.blocks) + 1
    for number in range(1, last):
        with block_there(model, prefix, number):
            for name in ("", *plans):
                with _applied(plans, name, hold=True):
                    for i, batch in enumerate(batches):
                        state = joined_state(*borders.get((name, i))) if number > 1 else None
                        borders.put((name, i), segment(model, prefix, number, batch, state))
                give_back()
        done.to(number / last)
    with block_there(model, prefix, last):
        for i, batch in enumerate(batches):
            labels = labels_in(model, batch)
            state = joined_state(*borders.get(("", i)))
            log_p = segment(model, prefix, last, batch, state).log_softmax(-1)
            tally.original(log_p, labels)
            for name in plans:
                with _applied(plans, name):
                    state = joined_state(*borders.get((name, i)))
                    logits = segment(model, prefix, last, batch, state)
                tally.add(name, log_p, logits, labels)
                del logits
            give_back()


def _applied(plans: Plans, name: str, hold: bool = False) -> Any:
    if not name:
        return nullcontext()
    renderer, assignment = plans[name]
    return renderer.applied(assignment, hold)


def _prefix(model: LoadedModel, plans: Plans, samples: Samples) -> Prefix:
    """The blocks, none if the model cannot be run from between them."""
    renderer = next(iter(plans.values()))[0]
    prefix = Prefix(blocks_of(model.module, renderer.units).values())
    trials = trials_of(model, samples)
    with torch.no_grad():
        prefix.trace(model.logits, trials[0])
        if prefix.blocks and not blocks_agree(model, prefix, trials):
            prefix.blocks = []
    return prefix


def _rounds(batches: Sequence[Batch]) -> Iterator[Sequence[Batch]]:
    """The first batches, which show who is far behind, and the others."""
    first = 0
    count = 0
    while first < len(batches) and count < FIRST:
        count += samples_in(batches[first])
        first += 1
    yield batches[:first]
    if first < len(batches):
        yield batches[first:]
