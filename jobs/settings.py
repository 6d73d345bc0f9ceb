"""What a run is asked for, as plain data that job.json records and --resume reads back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .._base.settings import setting
from ..models.names import BUILTIN, CODE, DEFAULT_MODEL, MIXTURE, PROSE
from ..quantizers.candidates import DEFAULT_FORMATS
from .limit_settings import (
    BUDGET_HELP,
    GOAL,
    GROUP_HELP,
    PRICES,
    SEARCH,
    SEED_HELP,
    SOLVER_HELP,
    PlanLimits,
)

if TYPE_CHECKING:
    from ..search.limits import Limits

REFINE_ABOVE = 0.2  # nats per token: above this predicted KL a plan is refined by default
REFINE_STEPS = 3
TRUST_HELP = (
    "Let a checkpoint run modelling code of its own, with your rights; it is never asked for."
)
DEVICE_HELP = "cpu, cuda, or auto: a GPU if there is one."
MEMORY_HELP = (
    "Main memory to do with, such as 3GiB, by default what is available: weights of a folder that "
    "would not fit stay in its files and are gone through block by block."
)
HELD_OUT_HELP = (
    "Held-out text: 'builtin' (prose that ships with Python), 'code', 'chat', or a text file."
)
NO_TEXT = "none"  # no second held-out text
_EXACT = {"extra": "forbid"}  # a setting of another version is not passed over in silence


@dataclass(frozen=True, slots=True)
class ProfileSettings:
    """Everything that determines a sensitivity table."""

    __pydantic_config__ = _EXACT

    model: str = setting(
        DEFAULT_MODEL,
        "Hugging Face id or folder, .gguf file, 'smollm2' (the embedded default) or "
        "file.py:function returning a bitplan.Workload.",
        argument="MODEL",
    )
    formats: tuple[str, ...] = setting(
        DEFAULT_FORMATS,
        "Candidate formats, comma-separated, or menus of them: default, int, all, or a runtime's; "
        "menus and grammar: `bitplan formats`.",
        panel=PRICES,
        reads="names",
    )
    metric: str = setting("fisher", "Sensitivity metric; see `bitplan metrics`.", panel=PRICES)
    rounding: str = setting(
        "fisher_gptq",
        "Rounding method whose errors are priced and shipped: fisher_gptq rounds so that the KL "
        "grows least; rtn, to nearest, is a quick look that needs no data.",
        panel=PRICES,
    )
    fold: str = setting(
        "none",
        "Scales that make matrices easier to round, moved into the norm or the layer before them, "
        "so that the model computes the same: awq (by the size of activations), sinq (by the "
        "weights alone) or none.",
        panel=PRICES,
    )
    calibration: str = setting(
        MIXTURE,
        "Calibration text: 'mixture' of prose, code and more that needs no download, one of "
        "'prose', 'code', 'chat', 'languages', 'self' (the last two sampled from the model), or a "
        "text file; several with weights: notes.txt:0.7,code:0.3.",
        panel=PRICES,
    )
    sequences: int = setting(
        96,
        "Calibration sequences N; a price errs by about sqrt(2/N). Like the next three, not used "
        "by a Workload with batches of its own.",
        panel=PRICES,
        minimum=1,
    )
    rounding_sequences: int = setting(
        128,
        "Further sequences of the calibration text that the weights are rounded by; prices never "
        "see them. Used by methods that need data, such as gptq.",
        panel=PRICES,
        minimum=1,
    )
    length: int = setting(
        128, "Tokens per sequence, to calibrate and to measure.", panel=PRICES, minimum=2
    )
    batch_tokens: int = setting(
        768, "Tokens per pass: fewer take less memory and more time.", panel=PRICES, minimum=1
    )
    include: tuple[str, ...] = setting(
        (), "Glob on layer names to quantize; repeatable.", panel=PRICES
    )
    exclude: tuple[str, ...] = setting(
        (), "Glob on layer names to leave as they are; repeatable.", panel=PRICES
    )
    groups: tuple[str, ...] = setting((), GROUP_HELP, "--group", panel=PRICES)
    per_expert: bool = setting(
        False, "A format for every expert, instead of one for all of a layer.", panel=PRICES
    )
    seed: int = setting(0, SEED_HELP)
    device: str = setting("auto", DEVICE_HELP)
    memory: str | None = setting(None, MEMORY_HELP)
    trust_remote_code: bool = setting(False, TRUST_HELP)

    @property
    def memory_bytes(self) -> int | None:
        """The same in bytes.

        Raises:
            ValueError: If it cannot be read.
        """
        return None if self.memory is None else memory_bytes(self.memory)


def memory_bytes(text: str) -> int:
    """Bytes of memory as a user writes them.

    >>> memory_bytes("3GiB")
    3221225472

    Raises:
        ValueError: If they cannot be read.
    """
    from ..search.budget import Budget

    try:
        found = Budget.parse(text)
    except ValueError:
        found = None
    if found is None or found.kind != "bytes":
        raise ValueError(f"Cannot read the memory {text!r}. Write it as 3GiB, 500MB or 4294967296.")
    return int(found.value)


@dataclass(frozen=True, slots=True)
class SearchSettings(PlanLimits):
    """What to solve for, under which limits, and what to validate on.

    Exactly one of ``budget``, ``vram``, ``max_kl`` and ``max_ppl`` is given.

    Attributes:
        command: The command line to record.
    """

    __pydantic_config__ = _EXACT

    budget: str | None = setting(None, BUDGET_HELP, "--budget", "-b", panel=GOAL)
    vram: str | None = setting(
        None, "Memory for weights and KV cache together, such as 8GiB.", panel=GOAL
    )
    max_kl: float | None = setting(
        None,
        "The smallest plan whose measured KL is at most this, in nats per token (per sample "
        "without text).",
        panel=GOAL,
    )
    max_ppl: float | None = setting(
        None, "The smallest plan whose measured perplexity is at most this.", panel=GOAL
    )
    fastest: bool = setting(
        False,
        "With --max-kl or --max-ppl: the fastest instead of the smallest plan that reaches it; "
        "needs --latency-device or --latency.",
        panel=GOAL,
    )
    context: int = setting(4096, "With --vram: tokens per sequence.", panel=GOAL, minimum=1)
    batch: int = setting(
        1,
        "With --vram or --latency-device: sequences at a time, a token of each per step.",
        panel=GOAL,
        minimum=1,
    )
    evaluation: str = setting(BUILTIN, HELD_OUT_HELP, "--eval", panel=SEARCH)
    eval_tokens: int = setting(16384, "Held-out tokens to measure on.", panel=SEARCH, minimum=2)
    eval_also: str | None = setting(
        None,
        "Second held-out text, of another kind, for the plan and its best uniform rival, on a "
        "quarter of the tokens: by default 'code' ('prose' where --eval is code); 'none' for none.",
        panel=SEARCH,
    )
    solver: str = setting("certified", SOLVER_HELP, panel=SEARCH)
    refine: int | None = setting(
        None,
        "Most steps of refinement: prices at the plan's own weights, accepted on measured KL. By "
        f"default {REFINE_STEPS} when the predicted KL is above {REFINE_ABOVE}, else 0.",
        panel=SEARCH,
        minimum=0,
    )
    sequential: bool = setting(
        False,
        "Round the plan's weights again, block by block, each for the inputs that the rounded "
        "blocks before it give, making up for what these have lost. Ships only if it measures "
        "better.",
        panel=SEARCH,
    )
    tune: int = setting(
        0,
        "Steps of tuning: the plan's scales move down the gradient of its KL to the original, "
        "about 512 calibration tokens a step; codes and bytes stay, and every export takes them. "
        "Try 24 below 4 bits per weight. Ships only if it measures better.",
        panel=SEARCH,
        minimum=0,
    )
    guard: int = setting(
        64,
        "Further calibration sequences, kept apart to measure candidates on.",
        panel=SEARCH,
        minimum=8,
    )
    search_tokens: int = setting(
        500_000,
        "Tokens (samples without text) that a solver on measured KL (evolutionary, tpe, ...) may "
        "measure.",
        panel=SEARCH,
        minimum=1,
    )
    bootstrap: int = setting(
        200,
        "Resamples of the calibration that say how sure each format is; 0 for none.",
        panel=SEARCH,
        minimum=0,
    )
    storage: str | None = setting(
        None,
        "Optuna storage URL of a search with tpe or nsga2; default job.sqlite in the run folder.",
        panel=SEARCH,
    )
    study: str | None = setting(
        None,
        "Name of the study in --storage; default made of run, solver, bytes and seed.",
        panel=SEARCH,
    )
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
            from ..search.fastest import NEEDS_OF_FASTEST

            raise ValueError(NEEDS_OF_FASTEST.format("--max-kl or --max-ppl"))
        if self.refine and self.budget is None:
            raise ValueError(f"--refine works with --budget only, not with {given[0]}.")

    @property
    def goal(self) -> str:
        """The goal as part of a folder's name."""
        given = {"": self.budget, "vram": self.vram, "kl": self.max_kl, "ppl": self.max_ppl}
        text = next(f"{name}{value}" for name, value in given.items() if value is not None)
        return text.replace(":", "-") + ("-fastest" if self.fastest else "")

    @property
    def second_text(self) -> str | None:
        """What to measure the plan on besides ``evaluation``; None for nothing."""
        if self.eval_also is not None:
            return None if self.eval_also == NO_TEXT else self.eval_also
        return PROSE if self.evaluation == CODE else CODE

    def limits(self) -> Limits:
        """The limits besides bytes.

        Raises:
            ValueError: If the runtime or device is unknown, or a limit is incomplete.
        """
        return self._plan_limits(self.batch)


def read_settings(recorded: Mapping[str, Any]) -> tuple[ProfileSettings, SearchSettings]:
    """Settings from the JSON that job.json holds.

    Raises:
        ValueError: If another version wrote them.
    """
    from pydantic import TypeAdapter, ValidationError

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
