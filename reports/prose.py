"""The report's sentences: headline, verdict, cells of tables, descriptions of pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..models.wording import words_of
from ..search.budget import format_bytes
from ..search.coverage import bits_per
from ..search.plan import Plan
from ..search.solvers import is_exact
from .data import FrontierData, PredictionData, SensitivityData, UnitGrid, UnitRow
from .summary import (
    Comparison,
    best_uniform,
    describe_rival,
    facts,
    measured_on,
    only_format,
    rounding,
    size_of,
)
from .words import number, with_error

TOLD = (
    "coverage",
    "optimality",
    "KL on another text",
    "refined",
    "KV cache",
    "memory",
    "time",
    "time is a model",
    "runtime",
    "solver note",
)  # of the facts


def headline(plan: Plan) -> str:
    """Size, bits per weight and KL: ``265.0 MB → 81.0 MB, 3.90 bits per weight, KL 0.21 ...``."""
    measured, nats = plan.measured, words_of(plan.calibration).nats
    if measured is not None:
        kl = f"KL {with_error(measured.kl, measured.kl_stderr)} {nats} measured"
    else:
        kl = f"KL {with_error(plan.predicted_kl, plan.predicted_kl_stderr)} {nats} predicted"
    size = size_of(plan)
    before, after = format_bytes(size.before), format_bytes(size.after)
    bits = f"{plan.bpw:.2f} {bits_per(plan.coverage)}"
    return _unbroken(f"{before} → {after}, {bits}, {kl}")


def verdict(plan: Plan, rows: Sequence[Comparison]) -> list[str]:
    """How good the plan is, in sentences."""
    sentences = []
    if same := only_format(plan):
        sentences.append(f"Every unit is stored in the same format, {same}.")
    if rival := best_uniform(rows):
        which = "other uniform" if same else "uniform"
        told = describe_rival(rival, words_of(plan.calibration).many)
        sentences.append(f"Best {which} format within the budget: {told}.")
    elif not same:
        sentences.append("No uniform format fits the budget.")
    for name, phrase in facts(plan, rows):
        if name in TOLD:
            sentences.append(f"{name[0].upper()}{name[1:]}: {phrase.removesuffix('.')}.")
    if plan.measured is None:
        sentences.append("Not measured yet: bitplan search also checks its plan on held-out data.")
    return [_unbroken(sentence) for sentence in sentences]


def tiles(plan: Plan, rows: Sequence[Comparison]) -> list[tuple[str, str]]:
    """The numbers to remember, each with its meaning."""
    size, measured, rival = size_of(plan), plan.measured, best_uniform(rows)
    whole = plan.original_bytes is not None and plan.model_bytes is not None
    words = words_of(plan.calibration)
    tiles = [
        (
            f"{100 * size.ratio:.1f} %",
            "of the original file" if whole else "of the size at 16 bits",
        ),
        (f"{plan.bpw:.3f}", f"{bits_per(plan.coverage)}, budget {plan.budget.text}"),
    ]
    if measured is not None:
        kl = with_error(measured.kl, measured.kl_stderr)
        tiles.append((kl, f"KL measured on {measured.tokens:,} {words.many}, {words.nats}"))
    predicted = with_error(plan.predicted_kl, plan.predicted_kl_stderr)
    tiles.append((predicted, f"KL predicted, {words.nats}"))
    if rival is not None:
        ours, theirs, kind = plan.predicted_kl, rival.predicted_kl, ", predicted"
        if measured is not None and rival.kl is not None:
            # On the same samples, of which a rival far behind has fewer.
            ours, theirs, kind = rival.kl - (rival.difference or 0.0), rival.kl, ""
        if ours > 0:
            tiles.append((f"{theirs / ours:.2f} ×", f"this KL in the best uniform format{kind}"))
    if measured is not None and measured.ppl is not None:
        original = measured.ppl_original
        label = "perplexity" + (f", original {number(original)}" if original is not None else "")
        tiles.append((number(measured.ppl), label))
    return tiles


def price_note(plan: Plan) -> str:
    """Why a plan need not be optimal by one-shot prices; empty if it is."""
    if plan.refinement is not None:
        return "Prices here are one-shot; this plan was refined away from them, on measured KL."
    if plan.sequential is not None:
        return "Prices here are of weights as first rounded; this plan's were rounded once more."
    if plan.tuning is not None:
        return "Prices here are of scales before tuning; this plan's were tuned to lower its KL."
    if plan.solver == "uniform":
        return "By these prices another plan is better; on held-out data one format everywhere was."
    if not is_exact(plan.solver):
        return (
            f"This plan comes from the {plan.solver!r} solver, which need not find their optimum."
        )
    return ""


def _unbroken(text: str) -> str:
    """Keep a value together with its error and its percent sign."""
    return text.replace(" ± ", "\u00a0±\u00a0").replace(" %", "\u00a0%")


def comparison_cells(
    row: Comparison, own: bool, text: bool = True, many: str = "tokens"
) -> dict[str, Any]:
    """One line of the comparison table as text.

    Args:
        row: The line.
        own: Whether it is the plan in question.
        text: Whether the model reads text, and so has a perplexity.
        many: What a KL is a mean over, several of them.
    """
    few = measured_on(row, many)
    ratio = "" if not row.kl else f"{row.predicted_kl / row.kl:.2f}"
    difference = ""
    if row.difference is not None:
        difference = with_error(row.difference, row.difference_stderr, sign=True)
    return {
        "name": row.label,
        "own": own,
        "misfit": row.misfit,
        "note": f"measured {few}, far behind" if few else "",
        "predicted": [
            format_bytes(row.bytes),
            "" if math.isnan(row.bpw) else f"{row.bpw:.3f}",
            number(row.predicted_kl),
        ],
        "measured": [
            "" if row.kl is None else with_error(row.kl, row.kl_stderr),
            ratio,
            difference,
            *(["" if row.ppl is None else number(row.ppl)] if text else []),
        ],
    }


def unit_cells(row: UnitRow) -> tuple[str, ...]:
    """One line of the table of units as text; the last cell is empty without another rounding."""
    kl = "" if row.kl is None else with_error(row.kl, row.kl_stderr)
    nearest = "" if row.nearest is None else number(row.nearest)
    size = f"{row.bpw:.3f}", format_bytes(row.bytes)
    return (row.name, row.shape, row.format, *size, kl, nearest)


def provenance(plan: Plan) -> dict[str, str]:
    """Where the numbers come from, as names and values."""
    values = {
        "Model": plan.model.id,
        "Model revision": plan.model.revision,
        "Model SHA-256": plan.model.sha256,
        "Metric": plan.metric,
        "Rounding": rounding(plan),
        "Solver": plan.solver,
        "Calibration": _pairs(_said(plan.calibration)),
        "Versions": _pairs(plan.versions),
        "Created": plan.created,
    }
    if (measured := plan.measured) is not None:
        count = f"{measured.text}, {measured.tokens:,} {words_of(plan.calibration).many}"
        text = measured.length is not None
        values["Measured on"] = count + (f" in sequences of {measured.length}" if text else "")
        values[f"Measured {'text' if text else 'samples'} SHA-256"] = measured.text_sha256
    for also in plan.measured_also:
        values[f"Measured also on {also.text}"] = f"{also.tokens:,} tokens, {also.text_sha256}"
    return {name: str(value) for name, value in values.items() if value is not None}


def _said(calibration: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a calibration with the model's own word for what was drawn."""
    renamed = {"sequences": words_of(calibration).drawn}
    told = {name: v for name, v in calibration.items() if name not in ("per", "texts")}
    return {renamed.get(name, name): v for name, v in told.items()}


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)


def frontier_alt(data: FrontierData) -> str:
    """What the frontier figure shows, in words."""
    first, last = data.frontier.kl[0], data.frontier.kl[-1]
    best = data.plan_measured or data.plan
    return (
        f"KL in {data.nats} against stored size. Optimal plans fall from {number(first)} at "
        f"{data.frontier.bpw[0]:.2f} bits per weight to {number(last)} at "
        f"{data.frontier.bpw[-1]:.2f}. The plan has {best.bpw:.2f} bits per weight and KL "
        f"{with_error(best.kl, best.stderr)}."
    )


def allocation_alt(grid: UnitGrid) -> str:
    """What the allocation figure shows, in words."""
    widths = [float(value) for value in grid.values.flat if value > 0]
    widths += [unit.value for unit in grid.others]
    return f"Bits per weight of every unit, from {min(widths):.2f} to {max(widths):.2f}."


def sensitivity_alt(data: SensitivityData) -> str:
    """What the sensitivity figure shows, in words."""
    named = {unit.name: unit.value for unit in data.kl.others} | {
        f"{kind} in layer {layer}": float(data.kl.values[row, column])
        for row, kind in enumerate(data.kl.kinds)
        for column, layer in enumerate(data.kl.layers)
    }
    named = {name: value for name, value in named.items() if math.isfinite(value)}
    worst = max(named, key=lambda name: named[name])
    return (
        f"Predicted KL of every unit stored alone in {data.format}. The most sensitive is "
        f"{worst} with {number(named[worst])} {data.nats}."
    )


def prediction_alt(data: PredictionData) -> str:
    """What the figure of predictions and measurements shows, in words."""
    if not data.checks:
        return "Predicted against measured KL; nothing was measured."
    ratios = [c.measured / c.predicted for c in data.checks if c.predicted > 0]
    spread = f"from {min(ratios):.2f} to {max(ratios):.2f}" if ratios else "unknown"
    return (
        f"Measured against predicted KL of {len(data.checks)} plans, in {data.nats}. The ratio "
        f"of measured to predicted KL ranges {spread}."
    )
