"""What restricts a plan besides bytes, as it is asked for: of a search, or on a saved profile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._base.settings import setting

if TYPE_CHECKING:
    from ..search.limits import Limits

GOAL, PRICES = "Goal (one of them)", "Candidates and prices"  # headings of options
LIMITS, SEARCH = "Limits", "Search and validation"
PANELS = (GOAL, PRICES, SEARCH, LIMITS)  # in the order of --help

BUDGET_HELP = (
    "Bits per weight of everything stored (4.3bpw), bytes (750MB, 6GiB), a ratio to 16 bits "
    "(0.3x) or the size of the written file (file:82MB). Default 4.3bpw."
)
GROUP_HELP = "Layers that share one format, such as 'q_proj,k_proj,v_proj'; repeatable."
SOLVER_HELP = "Solver; see `bitplan solvers`."
SEED_HELP = "The same seed gives the same plan."


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatLimits:
    """Which formats layers may take."""

    pins: Mapping[str, str] = setting(
        dict, "GLOB=FORMAT: layers that must take a format; repeatable.", "--pin", panel=LIMITS
    )
    bans: Mapping[str, tuple[str, ...]] = setting(
        dict,
        "GLOB=FORMAT-GLOB: formats that layers must not take; repeatable.",
        "--ban",
        panel=LIMITS,
    )
    at_least: Mapping[str, str] = setting(
        dict, "GLOB=FORMAT: layers that take no fewer bits; repeatable.", "--min", panel=LIMITS
    )
    at_most: Mapping[str, str] = setting(
        dict, "GLOB=FORMAT: layers that take no more bits; repeatable.", "--max", panel=LIMITS
    )
    runtime: str | None = setting(
        None,
        "Keep to what a runtime can run, and count the bytes its files take where bitplan writes "
        "them: autoround, gptq, llama.cpp, mlx, onnx, transformers, vllm, ...",
        "--for",
        panel=LIMITS,
    )

    def _limits(self, **more: Any) -> Limits:
        """These limits and more of :class:`..search.limits.Limits`."""
        from ..quantizers.runtimes import Rules
        from ..search.limits import Limits

        return Limits(
            pins=self.pins,
            bans=self.bans,
            at_least=self.at_least,
            at_most=self.at_most,
            rules=None if self.runtime is None else Rules.load(self.runtime),
            **more,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanLimits(FormatLimits):
    """The same, and what a whole plan may cost."""

    max_bops: float | None = setting(
        None,
        "Most bit operations (weight bits x 16) per token, such as 12G.",
        panel=LIMITS,
        reads="count",
    )
    latency: str | None = setting(
        None,
        "JSON of measured milliseconds by layer and format; the plan says its time, --max-ms "
        "limits it.",
        panel=LIMITS,
        reads="path",
    )
    latency_device: str | None = setting(
        None,
        "Predict milliseconds per step of --batch tokens on a device: h100, a100:humming, ... "
        "(`bitplan kernels devices`), or a file of `bitplan kernels bench --refit`.",
        panel=LIMITS,
    )
    max_ms: float | None = setting(
        None, "Most milliseconds per step; with --latency-device or --latency.", panel=LIMITS
    )

    def _plan_limits(self, batch: int, **more: Any) -> Limits:
        """All limits, for ``batch`` tokens per step."""
        from ..kernels.latency import Device

        return self._limits(
            max_bops=self.max_bops,
            latency=None if self.latency is None else Path(self.latency),
            device=None if self.latency_device is None else Device.load(self.latency_device),
            tokens=batch,
            max_ms=self.max_ms,
            **more,
        )


def _some_formats() -> Any:
    return setting(
        None,
        "Use only these of the profile's formats, comma-separated.",
        panel=LIMITS,
        reads="names",
    )


def _fused() -> Any:
    return setting((), GROUP_HELP, "--group", panel=LIMITS)


@dataclass(frozen=True, slots=True)
class FrontierSettings(FormatLimits):
    """What `bitplan frontier` is asked for on a saved profile."""

    formats: tuple[str, ...] | None = _some_formats()
    groups: tuple[str, ...] = _fused()

    def limits(self) -> Limits:
        """The limits.

        Raises:
            ValueError: If the runtime is unknown.
        """
        return self._limits(formats=self.formats, groups=self.groups)


@dataclass(frozen=True, slots=True)
class SolveSettings(PlanLimits):
    """What `bitplan solve` is asked for on a saved profile."""

    budget: str | None = setting(None, BUDGET_HELP, "--budget", "-b")
    max_kl: float | None = setting(
        None,
        "The smallest plan within --budget of at most this predicted KL, in nats per token (per "
        "sample without text).",
    )
    fastest: bool = setting(
        False,
        "With --max-kl and --latency-device (or --latency): the fastest instead of the smallest; "
        "of any size without --budget.",
    )
    batch: int = setting(
        1,
        "With --latency-device: sequences at a time, a token of each per step.",
        minimum=1,
    )
    formats: tuple[str, ...] | None = _some_formats()
    groups: tuple[str, ...] = _fused()
    solver: str = setting("certified", SOLVER_HELP, panel=SEARCH)
    seed: int = setting(0, SEED_HELP)

    def __post_init__(self) -> None:
        """Check what needs no profile.

        Raises:
            ValueError: If a batch is given and no device.
        """
        if self.batch != 1 and self.latency_device is None:
            raise ValueError(
                "--batch sets how many tokens a device computes at a time: it needs "
                "--latency-device."
            )

    def limits(self) -> Limits:
        """The limits besides bytes.

        Raises:
            ValueError: If the runtime or device is unknown, or a limit is incomplete.
        """
        return self._plan_limits(self.batch, formats=self.formats, groups=self.groups)
