"""The rivals' rows beside bitplan's figures, and the picture of both."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import LogLocator, NullFormatter

from bitplan.benchmarks.rivals_cases import SHOWN, Case
from bitplan.reports.canvas import GREEN, INK, PLAIN, RED, drawing

OURS = "fisher_gptq"  # the variant of results/rounding.json
LOOKS = {  # colour and marker
    "gptqmodel": (RED, "s"),
    "autoround": ("#3A7EBF", "^"),
    "autoscheme": ("#3A7EBF", "v"),
    "hqq": ("#8E6BBF", "D"),
    "modelopt": ("#C7851E", "P"),
    "llama.cpp": (INK, "X"),
}


@dataclass(frozen=True)
class Point:
    """bitplan at one budget: bits per weight, and KL with the standard error of its mean."""

    bpw: float
    kl: float
    stderr: float
    kl_on_code: float | None


@dataclass(frozen=True)
class Found:
    """A rival with one setting, and what is known of it.

    Attributes:
        case: The rival.
        tool: With its version; None if it did not run.
        bytes: Of the quantized matrices, as its file stores them.
        bpw: Those in bits per weight.
        text: Scores on the first text, as plain data; None if it did not run.
        code: Scores on the second.
        note: Why there are no scores.
    """

    case: Case
    tool: str | None = None
    bytes: int | None = None
    bpw: float | None = None
    text: Mapping[str, Any] | None = None
    code: Mapping[str, Any] | None = None
    note: str = ""

    @classmethod
    def of(cls, case: Case, kept: Mapping[str, Any] | None) -> Found:
        """From the row that was kept, if there is one."""
        if kept is None or "scores" not in kept:
            return cls(case, note=(kept or {}).get("note", "not run here"))
        text, code = kept["scores"].values()
        return cls(case, kept["tool"], kept["bytes"], kept["bpw"], text, code)


def ours(results: Path) -> list[Point]:
    """bitplan's figures by budget, ascending: means over seeds, from the rounding benchmark."""
    rows = json.loads(results.read_text(encoding="utf-8"))["rows"]
    points = [
        Point(
            row["bpw"],
            row["KL"],
            # of the seeds' mean and of the text, which all seeds share
            float(np.hypot((row["± over seeds"] or 0) / row["seeds"] ** 0.5, row["± over text"])),
            row["KL on code"],
        )
        for row in rows
        if row["variant"] == OURS
    ]
    return sorted(points, key=lambda point: point.bpw)


def at(points: Sequence[Point], bpw: float) -> tuple[float, float] | None:
    """bitplan's KL and its standard error at so many bits.

    Between budgets log KL is taken to be linear in bits. Beyond the largest budget that budget's
    KL stands, which spends fewer bits; below the smallest there is nothing.

    >>> points = [Point(2.0, 0.4, 0.04, None), Point(3.0, 0.1, 0.01, None)]
    >>> [round(value, 3) for value in at(points, 2.5)]
    [0.2, 0.02]
    >>> [round(value, 3) for value in at(points, 4.0)], at(points, 1.9)
    ([0.1, 0.01], None)
    """
    bits = [point.bpw for point in points]
    if not bits or bpw < bits[0] - 0.005:  # a budget is missed by bytes, not by hundredths
        return None
    kl = float(np.exp(np.interp(bpw, bits, np.log([point.kl for point in points]))))
    relative = float(np.interp(bpw, bits, [point.stderr / point.kl for point in points]))
    return kl, kl * relative


def on_code(points: Sequence[Point], bpw: float) -> float | None:
    """bitplan's KL on code at so many bits, as :func:`at`; None where a budget has no figure."""
    code = [Point(p.bpw, p.kl_on_code, 0.0, None) for p in points if p.kl_on_code is not None]
    there = at(code, bpw) if len(code) == len(points) else None
    return there and there[0]


def verdict(kl: float, stderr: float, there: tuple[float, float] | None) -> str:
    """Who has less KL at these bytes, beyond two standard errors of the difference.

    >>> verdict(0.30, 0.01, (0.20, 0.01)), verdict(0.21, 0.01, (0.20, 0.01))
    ('bitplan', 'level')
    """
    if there is None:
        return "no figure of bitplan"
    difference = kl - there[0]
    if abs(difference) <= 2 * np.hypot(stderr, there[1]):
        return "level"
    return "bitplan" if difference > 0 else "the rival"


def table(found: Sequence[Found], points: Sequence[Point]) -> list[dict[str, Any]]:
    """One row per rival and setting, fewest bits first, and bitplan's own among them."""
    rows = []
    for one in found:
        row: dict[str, Any] = {"tool": SHOWN[one.case.tool], "setting": one.case.name}
        if one.text is None or one.code is None or one.bpw is None or one.bytes is None:
            rows.append(row | dict.fromkeys(KEYS) | {"less KL": one.note})
            continue
        kl, stderr = one.text["mean"], one.text["stderr"]
        there = at(points, one.bpw)
        rows.append(
            row
            | {
                "bpw": one.bpw,
                "MB": one.bytes / 1e6,
                "KL": kl,
                "±": stderr,
                "bitplan's KL at these bytes": there and there[0],
                "KL / bitplan's": there and kl / there[0],
                "less KL": verdict(kl, stderr, there),
                "same top-1": one.text["same_top1"],
                "perplexity": one.text["ppl"],
                "KL on code": one.code["mean"],
                "± on code": one.code["stderr"],
                "bitplan's on code": on_code(points, one.bpw),
            }
        )
    rows += [
        {"tool": "bitplan", "setting": OURS}
        | dict.fromkeys(KEYS)
        | {"bpw": p.bpw, "KL": p.kl, "±": p.stderr, "KL on code": p.kl_on_code, "less KL": ""}
        for p in points
    ]
    return sorted(rows, key=lambda row: (row["bpw"] is None, row["bpw"] or 0.0))


KEYS = (
    "bpw",
    "MB",
    "KL",
    "±",
    "bitplan's KL at these bytes",
    "KL / bitplan's",
    "less KL",
    "same top-1",
    "perplexity",
    "KL on code",
    "± on code",
    "bitplan's on code",
)


def notes(
    found: Sequence[Found], checks: Sequence[Mapping[str, Any]], tokens: int, calibration: int
) -> list[str]:
    """What was measured and how, and who wins how often."""
    measured = [one for one in found if one.text is not None]
    tools = sorted({one.tool for one in measured if one.tool})
    lines = [
        f"KL(original || quantized) in nats per token on {tokens:,} tokens of WikiText-2 test, "
        f"`KL on code` on {tokens // 4:,} of code, in sequences of 128; one evaluator for all, on "
        "what each tool stored, dequantized into the original model. `bpw` and `MB` are the bytes "
        "of the quantized matrices in the tool's file: codes, scales and zero points; GPTQ's "
        "constant `g_idx` is not counted. ModelOpt writes no packed file of these widths: its "
        "bytes are those of codes and a float16 scale a group. The linear layers of the blocks "
        "are quantized, the embedding is not.",
        f"Every tool that takes data calibrated on the same {calibration:,} tokens of WikiText-2 "
        "valid, as many as a search of bitplan reads. Settings besides those named are the tool's "
        "defaults.",
        "`bitplan's KL at these bytes` is between two of its budgets on the line of log KL over "
        "bits, and beyond the largest that budget's, which takes fewer bytes. `less KL` names who "
        "has less beyond two standard errors.",
        "llama.cpp has no type below 4 bits for rows of 576 weights but Q2_0 and Q1_0: K and i "
        "types there silently become Q4_0 or IQ4_NL, so its smallest files are about 4 bits.",
        "The original's weights were Q4_1 once: blocks of 32 with 16 levels each. Tools whose "
        "groups are those blocks meet their own grid.",
    ]
    if measured and (ppl := measured[0].text) is not None:
        lines.append(f"Perplexity of the original: {ppl['ppl_original']:.2f}.")
    if tools:
        lines.append(f"Tools: {', '.join(tools)}.")
    for check in checks:
        text, code = check["scores"].values()
        before = (
            "" if check["searched"] is None else f", where its search had {check['searched']:.4f}"
        )
        lines.append(
            f"bitplan's plan {check['run'].removeprefix('bitplan-')} ({check['bpw']:.3f} bits) "
            f"through this evaluator: KL {text['mean']:.4f} ± {text['stderr']:.4f}{before}; on "
            f"code {code['mean']:.4f} ± {code['stderr']:.4f}; same top-1 {text['same_top1']:.1%}, "
            f"perplexity {text['ppl']:.2f}."
        )
    return lines


def draw(found: Sequence[Found], points: Sequence[Point], path: Path) -> None:
    """KL against bits per weight, with two standard errors."""
    with drawing(path, height=5.4) as figure:
        axes = figure.add_subplot()
        axes.errorbar(
            [p.bpw for p in points],
            [p.kl for p in points],
            [2 * p.stderr for p in points],
            color=GREEN,
            marker="o",
            capsize=3,
            label="bitplan",
            zorder=3,
        )
        for tool, (color, marker) in LOOKS.items():
            some = [one for one in found if one.case.tool == tool and one.text and one.bpw]
            if not some:
                continue
            axes.errorbar(
                [one.bpw or 0 for one in some],
                [one.text["mean"] for one in some if one.text],
                [2 * one.text["stderr"] for one in some if one.text],
                color=color,
                marker=marker,
                ls="none",
                capsize=3,
                label=SHOWN[tool],
            )
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(PLAIN)
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("bits per weight, scales and zero points included")
        axes.set_ylabel("KL on the test text, nats per token")
        axes.set_title("SmolLM2-135M, quantized by each tool's own program")
        axes.grid(visible=True, which="both", alpha=0.4)
        axes.legend()
