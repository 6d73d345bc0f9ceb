"""Sequential rounding as a job: kept block by block, measured on sequences apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field

from .._base.records import Record
from ..models.measure import standard_error
from ..models.samples import Samples
from ..quantizers.packed import PackedTensor
from ..search.plan import Plan
from ..sensitivity.sequential import REVISION, Codes, Sequential
from .folder import RunFolder
from .rerounded import Kept
from .tuning import Measure, course_key


class Rerounded(Record):
    """How rounding a plan again went, as far as it is.

    Attributes:
        codes: SHA-256 of every matrix that was rounded again, by name.
        kl_before: Mean KL as it was rounded first, nats per token, over the original's likeliest
            classes; None while not all is rounded, and so for the rest.
        kl_after: The same now.
        difference: The latter less the former.
        difference_stderr: Its paired standard error.
        sha256: Hash of the list of the new weights.
    """

    KIND: ClassVar[str] = "record of sequential rounding"

    schema_version: Literal[1] = Field(default=1, alias="schema")
    codes: dict[str, str] = Field(default_factory=dict)
    kl_before: float | None = None
    kl_after: float | None = None
    difference: float | None = None
    difference_stderr: float | None = None
    sha256: str | None = None

    @property
    def helps(self) -> bool:
        """Whether the KL fell by more than its standard error."""
        if self.difference is None or self.difference_stderr is None:
            return False
        return self.difference < -self.difference_stderr


@dataclass(frozen=True, slots=True)
class Course:
    """Where one sequential rounding is kept in a run folder.

    Attributes:
        run: The folder.
        key: What it depends on, as a hash: :func:`key_of`.
    """

    run: RunFolder
    key: str

    def found(self) -> Rerounded:
        """As far as an earlier run came."""
        try:
            return Rerounded.read(self.run.rounding(self.key))
        except (ValueError, OSError):  # not there, or damaged
            return Rerounded()

    def finished(self) -> Rerounded | None:
        """One that came to its end, and whose weights are there, all and whole, with their list."""
        found, kept = self.found(), Kept(self.run)
        if found.sha256 is None or found.difference is None:
            return None
        if not self.run.rounded_list(found.sha256).is_file():
            return None
        there = (kept.get(digest, torch.device("cpu")) for digest in found.codes.values())
        return found if all(packed is not None for packed in there) else None


def reround(course: Course, again: Sequential, measure: Measure) -> Rerounded:
    """Round a plan again, and measure what that changed.

    New weights are kept after every block: one that was killed goes on from there, and comes to the
    same weights.

    Args:
        course: Where it is kept.
        again: Rounds.
        measure: Measures the plan as a renderer has it, on sequences that are not rounded by.
    """
    kept, found = Kept(course.run), course.found()
    done: dict[str, PackedTensor] = {}
    for name, digest in found.codes.items():
        if (packed := kept.get(digest, torch.device("cpu"))) is not None:
            done[name] = packed.to(again.renderer.weight(name).device)
    digests = {name: found.codes[name] for name in done}

    def keep(codes: Codes) -> None:
        digests.update({name: kept.put(packed) for name, packed in codes.items()})
        Rerounded(codes=dict(digests)).write(course.run.rounding(course.key))

    before = measure(again.before)
    after = measure(again.run(done, keep))
    result = Rerounded(
        codes=digests,
        kl_before=float(before.mean()),
        kl_after=float(after.mean()),
        difference=float((after - before).mean()),
        difference_stderr=standard_error(after - before),
        sha256=kept.save_list(digests),
    )
    result.write(course.run.rounding(course.key))
    return result


def key_of(plan: Plan, origin: str, samples: Samples, guard: Samples, *numbers: int) -> str:
    """What a sequential rounding depends on, as a hash.

    Args:
        plan: The plan as it was rounded first.
        origin: What its codes depend on: method, model and data.
        samples: Sequences that it is rounded by.
        guard: Sequences that it is measured on.
        *numbers: Whatever else: seed, classes kept.
    """
    return course_key(plan, origin, REVISION, samples, guard, *numbers)
