"""What a run is asked for, as plain data that job.json records and --resume reads back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from ..kernels.latency import Device
from ..models.samples import BUILTIN
from ..quantizers.runtimes import Rules
from ..search.fastest import NEEDS_OF_FASTEST
from ..search.limits import Limits
from ..sensitivity.estimate import DEFAULT_FORMATS

REFINE_ABOVE = 0.2  # nats per token: above this predicted KL a plan is refined by default
REFINE_STEPS = 3
_EXACT = ConfigDict(extra="forbid")  # a setting of another version is not passed over in silence


@dataclass(frozen=True, slots=True)
class ProfileSettings:
    """Everything that determines a sensitivity table."""

    __pydantic_config__ = _EXACT

    model: str
    formats: tuple[str, ...] = DEFAULT_FORMATS
    metric: str = "fisher"
    rounding: str = "rtn"
    calibration: str = BUILTIN
    sequences: int = 96
    length: int = 128
    batch_tokens: int = 768
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    per_expert: bool = False
    seed: int = 0
    device: str = "auto"


@dataclass(frozen=True, slots=True)
class SearchSettings:
    """What to solve for, under which limits, and what to validate on.

    Exactly one of ``budget``, ``vram``, ``max_kl`` and ``max_ppl`` is given.

    Attributes:
        budget: Bytes of the weights, such as ``4.3bpw``.
        vram: Bytes of weights and KV cache together, with ``context`` tokens x ``batch``.
        max_kl: The smallest plan whose measured KL is at most this, nats per token.
        max_ppl: The smallest plan whose measured perplexity is at most this.
        fastest: The fastest instead of the smallest plan that reaches ``max_kl`` or ``max_ppl``.
        context: Tokens per sequence that the KV cache must hold.
        batch: Sequences it must hold, and tokens per step that ``latency_device`` predicts.
        solver: Name of the solver.
        refine: Re-linearization steps; None for REFINE_STEPS above REFINE_ABOVE, else none.
        guard: Calibration sequences kept apart to measure candidates on.
        search_tokens: Tokens through the model that a search on true KL may spend.
        bootstrap: Resamples for each unit's confidence; 0 for none.
        storage: Optuna storage URL; None for ``job.sqlite`` in the run folder.
        study: Name of the study there; None for the run folder's name.
        pins: Glob -> format, as in :class:`.limits.Limits`, like the others below.
        bans: Glob -> format globs.
        at_least: Glob -> format.
        at_most: Glob -> format.
        runtime: Runtime whose rules restrict the candidates.
        max_bops: Most bit operations per token.
        latency: JSON file of milliseconds per unit and format.
        latency_device: Device whose latency model gives milliseconds: a name or a TOML file.
        max_ms: Most milliseconds.
        evaluation: Held-out text.
        eval_tokens: Held-out tokens to measure on.
        command: The command line to record.
    """

    __pydantic_config__ = _EXACT

    budget: str | None = None
    vram: str | None = None
    max_kl: float | None = None
    max_ppl: float | None = None
    fastest: bool = False
    context: int = 4096
    batch: int = 1
    solver: str = "certified"
    refine: int | None = None
    guard: int = 64
    search_tokens: int = 500_000
    bootstrap: int = 200
    storage: str | None = None
    study: str | None = None
    pins: Mapping[str, str] = field(default_factory=dict)
    bans: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    at_least: Mapping[str, str] = field(default_factory=dict)
    at_most: Mapping[str, str] = field(default_factory=dict)
    runtime: str | None = None
    max_bops: float | None = None
    latency: str | None = None
    latency_device: str | None = None
    max_ms: float | None = None
    evaluation: str = BUILTIN
    eval_tokens: int = 16384
    command: str | None = None

    def __post_init__(self) -> None:
        """Check that there is exactly one goal, and one that can be refined if that is asked for.

        Raises:
            ValueError: If there is none, or more than one, or it cannot be refined.
        """
        goals = {
            "--budget": self.budget,
            "--vram": self.vram,
            "--max-kl": self.max_kl,
            "--max-ppl": self.max_ppl,
        }
        given = [name for name, value in goals.items() if value is not None]
        if len(given) != 1:
            raise ValueError(
                f"Give one goal: {', '.join(goals)}"
                + (f"; {' and '.join(given)} were given." if given else ".")
            )
        if self.bootstrap == 1:
            raise ValueError("One resample says nothing: --bootstrap 0 for none, or 200.")
        if self.vram is None and self.context != 4096:
            raise ValueError("--context sizes a KV cache: it needs --vram.")
        if self.vram is None and self.latency_device is None and self.batch != 1:
            raise ValueError(
                "--batch sizes a KV cache and sets how many tokens a device computes at a time: it "
                "needs --vram or --latency-device."
            )
        timed = self.latency is not None or self.latency_device is not None
        if self.fastest and not (timed and {"--max-kl", "--max-ppl"} & set(given)):
            raise ValueError(NEEDS_OF_FASTEST.format("--max-kl or --max-ppl"))
        if self.refine and self.budget is None:
            raise ValueError(f"--refine works with --budget only, not with {given[0]}.")

    @property
    def goal(self) -> str:
        """The goal as part of a folder's name."""
        given = {"": self.budget, "vram": self.vram, "kl": self.max_kl, "ppl": self.max_ppl}
        text = next(f"{name}{value}" for name, value in given.items() if value is not None)
        return text.replace(":", "-") + ("-fastest" if self.fastest else "")

    def limits(self) -> Limits:
        """The limits besides bytes.

        Raises:
            ValueError: If the runtime or device is unknown, or a limit is incomplete.
        """
        return Limits(
            pins=self.pins,
            bans=self.bans,
            at_least=self.at_least,
            at_most=self.at_most,
            max_bops=self.max_bops,
            latency=None if self.latency is None else Path(self.latency),
            device=None if self.latency_device is None else Device.load(self.latency_device),
            tokens=self.batch,
            max_ms=self.max_ms,
            rules=None if self.runtime is None else Rules.load(self.runtime),
        )


def read_settings(recorded: Mapping[str, Any]) -> tuple[ProfileSettings, SearchSettings]:
    """Settings from the JSON that job.json holds.

    Raises:
        ValueError: If another version wrote them.
    """
    if "search" not in recorded:
        raise ValueError(
            "This folder holds the job of `bitplan profile`, not of a search. Run `bitplan search` "
            "with --out on the same folder: it takes the profile that is there."
        )
    try:
        return (
            TypeAdapter(ProfileSettings).validate_python(recorded["profile"]),
            TypeAdapter(SearchSettings).validate_python(recorded["search"]),
        )
    except (KeyError, ValidationError) as error:
        raise ValueError(
            f"The settings recorded in job.json cannot be read ({error}). Give the command again "
            "with its options."
        ) from error
