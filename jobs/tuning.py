"""Scale tuning as a job: watched on sequences apart, kept in the run folder, and taken up again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .._base.files import atomic_path
from .._base.records import Record, Strict
from ..models.measure import standard_error
from ..models.rendering import Assignment, Renderer
from ..models.samples import Samples
from ..models.topk import TopK
from ..models.workload import LoadedModel
from ..search.plan import Plan, plan_key
from ..sensitivity.tuning import REVISION, Tuner
from .folder import RunFolder
from .tuned import save_scales

CHECKS = 8  # at most, in the course of a tuning
LEAST_BETWEEN = 8  # steps from one check to the next
PATIENCE = 2  # checks in a row without a new best one, after which tuning stops

_RECORD, _BEFORE = "tuned", "kl before"  # in a file of state

Measure = Callable[[Renderer], NDArray[np.float64]]  # KL per sequence [N], nats per token


class Check(Strict):
    """The plan measured in the course of tuning, on sequences that no step is made from.

    Attributes:
        step: Steps taken by then.
        kl: Mean KL, nats per token, over the original's likeliest classes.
        difference: The same, less that of the plan before tuning; paired.
        difference_stderr: Its standard error.
    """

    step: int
    kl: float
    difference: float
    difference_stderr: float


class Tuned(Record):
    """How a tuning went.

    Attributes:
        steps: Steps that were asked for.
        tokens: Positions that each step looked at.
        rate: Of the logarithms of scales, at its highest.
        kl_before: Mean KL before the first step.
        checks: The plan as it was measured in between, in order.
        sha256: Hash of the scales of the best check, which are kept; None before the first one.
    """

    KIND: ClassVar[str] = "record of a tuning"

    schema_version: Literal[1] = Field(default=1, alias="schema")
    steps: int
    tokens: int
    rate: float = Field(gt=0)
    kl_before: float
    checks: list[Check] = Field(default_factory=list)
    sha256: str | None = None

    @property
    def best(self) -> Check | None:
        """The check with the least KL, the first of several; None before any."""
        return min(self.checks, key=lambda check: check.kl, default=None)

    @property
    def finished(self) -> bool:
        """Whether no further step is to be taken: all are, or the last ones were no better."""
        if not self.checks or self.best is None:
            return False
        stale = len(self.checks) - 1 - self.checks.index(self.best)
        return self.checks[-1].step >= self.steps or stale >= PATIENCE

    @property
    def helps(self) -> bool:
        """Whether the best check beats the plan before tuning by more than its standard error."""
        best = self.best
        return best is not None and best.difference < -best.difference_stderr


@dataclass(frozen=True, slots=True)
class Kept:
    """Where one tuning is kept in a run folder.

    Attributes:
        run: The folder.
        key: What the tuning depends on, as a hash: :func:`key_of`.
        assignment: The plan.
    """

    run: RunFolder
    key: str
    assignment: Assignment

    def finished(self) -> Tuned | None:
        """A tuning that came to its end, and whose scales are there."""
        try:
            found = Tuned.read(self.run.tuning(self.key))
        except (ValueError, OSError):  # not there, or damaged
            return None
        kept = found.sha256 is not None and self.run.tuned_scales(found.sha256).is_file()
        return found if kept and found.finished else None

    def resume(self, tuner: Tuner) -> tuple[Tuned, NDArray[np.float64]] | None:
        """Bring a tuner to where an interrupted run was; its record, and the KL before tuning."""
        path = self.run.tuning_state(self.key)
        try:
            with safe_open(path, framework="pt") as file:
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                found = Tuned.parse(file.metadata()[_RECORD], str(path))
            before: NDArray[np.float64] = state.pop(_BEFORE).numpy()
            tuner.restore(state, found.checks[-1].step)
            tuner.rate = found.rate
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None  # not there yet, or damaged
        return found, before

    def save(self, tuner: Tuner, found: Tuned, before: NDArray[np.float64]) -> Tuned:
        """Keep the state after a check, and the scales if it is the best one; the new record."""
        earlier, best = found.sha256, found.best
        if best is not None and best.step == tuner.taken:
            digest = save_scales(tuner.scales(), self.assignment, self.run)
            found = found.model_copy(update={"sha256": digest})
        state = {name: part.contiguous() for name, part in tuner.state().items()}
        about = {_RECORD: found.model_dump_json(by_alias=True)}
        with atomic_path(self.run.tuning_state(self.key)) as temporary:
            save_file({**state, _BEFORE: torch.from_numpy(before)}, temporary, about)
        if earlier is not None and earlier != found.sha256:
            self.run.tuned_scales(earlier).unlink(missing_ok=True)
        return found

    def finish(self, found: Tuned) -> None:
        """Keep the record of a tuning that is done, and not its state."""
        found.write(self.run.tuning(self.key))
        self.run.tuning_state(self.key).unlink(missing_ok=True)


def tune(
    tuner: Tuner,
    measure: Measure,
    steps: int,
    kept: Kept,
    *,
    advance: Callable[[int], None] = lambda _: None,
    report: Callable[[Check], None] = lambda _: None,
) -> Tuned:
    """Take steps, measure now and then, and keep the best scales.

    At every check the state is saved: a tuning that was killed goes on from there, and comes to the
    same scales.

    Args:
        tuner: Takes the steps.
        measure: Measures the plan as a renderer has it, on sequences that the tuner does not see.
        steps: The most steps.
        kept: Where this tuning is kept.
        advance: Called with numbers of steps that are done.
        report: Called with every check of this run.
    """
    if (resumed := kept.resume(tuner)) is not None:
        found, before = resumed
        advance(tuner.taken)
    else:
        before = measure(tuner.renderer)
        found = Tuned(
            steps=steps,
            tokens=tuner.tokens,
            rate=tuner.try_out(),
            kl_before=float(before.mean()),
        )
    every = max(steps // CHECKS, LEAST_BETWEEN)
    while not found.finished:
        tuner.step()
        advance(1)
        if tuner.taken % every and tuner.taken < steps:
            continue
        kl = measure(tuner.renderer)
        check = Check(
            step=tuner.taken,
            kl=float(kl.mean()),
            difference=float((kl - before).mean()),
            difference_stderr=standard_error(kl - before),
        )
        report(check)
        found = found.model_copy(update={"checks": [*found.checks, check]})
        found = kept.save(tuner, found, before)
    kept.finish(found)
    return found


def measure_on(model: LoadedModel, samples: Samples, assignment: Assignment, top_k: int) -> Measure:
    """Measures a plan on sequences, over the original's likeliest classes.

    The original runs once, here.

    Args:
        model: The original model.
        samples: The sequences.
        assignment: The plan.
        top_k: Classes kept per position.
    """
    with torch.no_grad():
        original = [TopK.of(model.logits(batch), top_k) for batch in samples.batches]

    def measure(renderer: Renderer) -> NDArray[np.float64]:
        with torch.no_grad(), renderer.applied(assignment):
            found = [
                reference.kl(model.logits(batch))
                for reference, batch in zip(original, samples.batches, strict=True)
            ]
        kl: NDArray[np.float64] = torch.cat(found).cpu().numpy()
        return kl

    return measure


def key_of(plan: Plan, definition: str, samples: Samples, guard: Samples, *numbers: int) -> str:
    """What a tuning depends on, as a hash.

    Args:
        plan: The plan before tuning.
        definition: Hash of the model's code.
        samples: Sequences that steps are made from.
        guard: Sequences that it is measured on.
        *numbers: Whatever else: steps, seed, classes kept.
    """
    numbers = (*numbers, CHECKS, LEAST_BETWEEN, PATIENCE)
    return course_key(plan, definition, REVISION, samples, guard, *numbers)


def course_key(
    plan: Plan, origin: str, revision: int, samples: Samples, guard: Samples, *numbers: int
) -> str:
    """What a change to a plan's weights depends on, as a hash.

    Args:
        plan: The plan before it.
        origin: What its codes depend on besides.
        revision: Of what is done to it.
        samples: Sequences that the change is made from.
        guard: Sequences that it is measured on.
        *numbers: Whatever else.
    """
    parts = [plan_key(plan), origin, version("bitplan"), str(revision)]
    for some in (samples, guard):
        parts += [some.sha256, str(some.count)]
    return hashlib.sha256("\n".join([*parts, *map(str, numbers)]).encode()).hexdigest()[:12]
