"""The plan in a few words, and the plans it is compared with."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from ..models.wording import Words, words_of
from ..quantizers.runtimes import Rules
from ..search.budget import format_bytes
from ..search.coverage import bits_per, describe_coverage
from ..search.plan import MeasuredAlso, Plan
from .words import gap as gap_in_words
from .words import number, with_error


class Comparison(NamedTuple):
    """One plan of the comparison table; measured numbers are None where not measured.

    KL is in nats per token or sample.  ``bytes`` are what the budget limits, a KV cache included;
    ``bpw`` is of the weights alone, NaN where those are not known apart; ``ms`` is the time where
    one was asked for.  ``misfit`` says in words why a plan is no choice (``over budget``), nothing
    if it is one; ``format`` is the one format of every unit, None for a mixed plan;
    ``difference`` is its measured KL minus that of the plan in question, paired over samples;
    ``tokens`` how many it was measured on, where it was so far behind that these were enough.
    """

    name: str
    bytes: int
    bpw: float
    misfit: str
    predicted_kl: float
    format: str | None = None
    ms: float | None = None
    kl: float | None = None
    kl_stderr: float | None = None
    ppl: float | None = None
    difference: float | None = None
    difference_stderr: float | None = None
    tokens: int | None = None

    @property
    def label(self) -> str:
        """The one format of a uniform plan, the name of another."""
        return self.format or self.name

    @property
    def fits(self) -> bool:
        """Whether the plan is within the budget and the time that were asked for."""
        return not self.misfit


def comparison(plan: Plan, uniform: Sequence[tuple[str, int, float]] = ()) -> list[Comparison]:
    """The plan first, then every measured baseline and every other uniform plan by size.

    Predicted next to measured KL, row by row, is the check of the sensitivity metric.

    Args:
        plan: The plan.
        uniform: Format, bytes and predicted KL of every uniform plan of the weights, measured or
            not; no rivals of a plan with a KV cache.
    """
    measured = plan.measured
    own = Comparison("this plan", plan.total_bytes, plan.bpw, "", plan.predicted_kl)
    if measured is not None:
        own = own._replace(kl=measured.kl, kl_stderr=measured.kl_stderr, ppl=measured.ppl)
    rows = baselines(plan)
    known = {row.format for row in rows} | {only_format(plan)}
    for fmt, nbytes, predicted in () if plan.kv_cache else uniform:
        if fmt not in known:
            bpw, misfit = 8 * nbytes / plan.weights, _misfit(plan, nbytes)
            rows.append(Comparison(f"uniform {fmt}", nbytes, bpw, misfit, predicted, fmt))
    return [own, *sorted(rows, key=lambda row: row.bytes)]


def baselines(plan: Plan) -> list[Comparison]:
    """The measured baselines of a plan, by size."""
    rows = [
        Comparison(
            name=b.name,
            bytes=b.bytes,
            bpw=math.nan if plan.kv_cache else 8 * b.bytes / plan.weights,
            misfit=_misfit(plan, b.bytes, b.ms),
            predicted_kl=b.predicted_kl,
            format=b.format,
            ms=b.ms,
            kl=b.kl,
            kl_stderr=b.kl_stderr,
            ppl=b.ppl,
            difference=b.difference,
            difference_stderr=b.difference_stderr,
            tokens=b.tokens,
        )
        for b in plan.baselines
    ]
    return sorted(rows, key=lambda row: row.bytes)


def _misfit(plan: Plan, nbytes: int, ms: float | None = None) -> str:
    """Why a rival is no choice: more bytes or time than asked for; empty if it is one."""
    if nbytes > plan.budget.bytes:
        return "larger" if plan.budget.is_target else "over budget"
    most = plan.latency.max_ms if plan.latency else None
    return "" if most is None or ms is None or ms <= most else "too slow"


def best_uniform(rows: Sequence[Comparison]) -> Comparison | None:
    """The uniform plan with the lowest KL that fits the budget: measured ones before predicted."""
    fitting = [row for row in rows if row.format and row.fits]
    measured = [row for row in fitting if row.kl is not None]
    return min(
        measured or fitting,
        key=lambda row: row.predicted_kl if row.kl is None else row.kl,
        default=None,
    )


def only_format(plan: Plan) -> str | None:
    """The format of a plan that uses a single one, else None."""
    formats = set(plan.assignments.values())
    return formats.pop() if len(formats) == 1 else None


def facts(plan: Plan, rows: Sequence[Comparison]) -> list[tuple[str, str]]:
    """What to know about a plan, as pairs of a name and a phrase.

    Args:
        plan: The plan.
        rows: Its rivals, from :func:`comparison`.
    """
    same = only_format(plan)
    lines = [
        *_sizes(plan),
        (
            bits_per(plan.coverage),
            f"{plan.bpw:.3f}" + ("" if plan.kv_cache else f" ({_goal(plan)})"),
        ),
        *_memory(plan),
        *_time(plan),
        *_quality(plan),
        ("rounding", rounding(plan)),
        ("optimality", optimality(plan)),
    ]
    if same:
        lines.append(("format", f"{same} for every unit"))
    if rival := best_uniform(rows):
        told = describe_rival(rival, words_of(plan.calibration).many)
        lines.append(("other uniform" if same else "best uniform", told))
    if (measured := plan.measured) is not None and measured.ppl is not None:
        original = measured.ppl_original
        before_text = f" (original {number(original)})" if original is not None else ""
        lines.append(("perplexity", number(measured.ppl) + before_text))
    if plan.runtime:
        text = f"keeps to what {plan.runtime} can run"
        known = Rules.load(plan.runtime).counted
        lines.append(("runtime", f"{text}, and counts the bytes it stores" if known else text))
    if plan.note:
        lines.append(("solver note", plan.note))
    return lines


class Size(NamedTuple):
    """What a plan makes of a model, in bytes.

    Attributes:
        before: Bytes of the original.
        after: Bytes with the plan.
        of: What they are of: the whole model's file, or only the weights that the plan is about
            where the rest is not known.
    """

    before: int
    after: int
    of: str

    @property
    def ratio(self) -> float:
        """``after / before``."""
        return self.after / self.before


def size_of(plan: Plan) -> Size:
    """The headline: what the whole model's file takes, before and after."""
    if plan.model_bytes is None or plan.original_bytes is None:
        return Size(2 * plan.weights, plan.bytes, "the planned weights, at 16 bits before")
    return Size(plan.original_bytes, plan.model_bytes, "the whole model's file")


def _sizes(plan: Plan) -> list[tuple[str, str]]:
    """The size of the whole file, and which part of the model the plan is about."""
    size = size_of(plan)
    percent = f"({100 * size.ratio:.1f} %)"
    if plan.model_bytes is None or plan.original_bytes is None:
        text = f"{format_bytes(size.before)} at 16 bits → {format_bytes(size.after)} {percent}"
        lines = [("weights" if plan.kv_cache else "size", text)]
    else:
        text = f"{format_bytes(size.before)} → {format_bytes(size.after)} {percent}"
        lines = [("size", f"{text}, {size.of}")]
    return lines + ([("coverage", describe_coverage(plan.coverage))] if plan.coverage else [])


def optimality(plan: Plan) -> str:
    """How far a plan can be from the best one, in words.

    The bound is on the KL that one-shot prices predict.  A refined plan goes by what was measured
    instead, so its distance from that bound says nothing about how good it is.
    """
    if plan.refinement is None:
        words = gap_in_words(plan.gap)
        return f"{words}, by predicted KL" if words.startswith("at most") else words
    return (
        "does not apply: refined by measured KL, away from the optimum of one-shot prices "
        f"(whose bound is {number(plan.lower_bound_kl)})"
    )


def _goal(plan: Plan) -> str:
    """What the plan was asked for: ``budget 4.3bpw``, or ``target KL <= 0.1``."""
    return f"{'target' if plan.budget.is_target else 'budget'} {plan.budget.text}"


def _quality(plan: Plan) -> list[tuple[str, str]]:
    """Predicted and measured KL, and what refinement, rounding again and tuning changed."""
    words = words_of(plan.calibration)
    predicted = with_error(plan.predicted_kl, plan.predicted_kl_stderr)
    predicted += f" {words.nats}" + (", one shot" if plan.refinement else "")
    predicted += ", before tuning" if plan.tuning else ""
    if plan.sequential and not plan.tuning:
        predicted += ", as rounded first"
    lines = [("KL predicted", predicted)]
    measured = "not measured"
    if (held_out := plan.measured) is not None:
        measured = f"{with_error(held_out.kl, held_out.kl_stderr)} {words.nats}"
        measured += f" on {held_out.tokens:,} held-out {words.many}"
    lines.append(("KL measured", measured))
    lines += [("KL on another text", describe_also(also, words)) for also in plan.measured_also]
    if (fold := plan.fold) is not None:
        places = "1 norm or layer" if fold.count == 1 else f"{fold.count} norms and layers"
        lines.append(("folded", f"scales ({fold.method}) into {places}, before all prices"))
    if (refined := plan.refinement) is not None:
        steps = "1 step" if refined.steps == 1 else f"{refined.steps} steps"
        kl = f"{number(refined.kl_before)} → {number(refined.kl_after)}"
        lines.append(("refined", f"{steps}: KL on calibration {words.drawn} {kl}"))
    if (again := plan.sequential) is not None:
        kl = f"{number(again.kl_before)} → {number(again.kl_after)}"
        how = f"{again.matrices} matrices, block by block"
        lines.append(("rounded again", f"{how}: KL on calibration {words.drawn} {kl}"))
    if (tuned := plan.tuning) is not None:
        kl = f"{number(tuned.kl_before)} → {number(tuned.kl_after)}"
        steps = "1 step" if tuned.steps == 1 else f"{tuned.steps} steps"
        lines.append(("tuned", f"scales: KL on calibration {words.drawn} {kl} in {steps}"))
    return lines


def describe_also(also: MeasuredAlso, words: Words) -> str:
    """A measurement on a second text in words: KL, text, and the rival's."""
    text = f"{with_error(also.kl, also.kl_stderr)} {words.nats} on {also.tokens:,} held-out"
    text += f" {words.many} of {also.text}"
    if also.rival is None or also.rival_kl is None:
        return text
    text += f"; {also.rival} there: KL {with_error(also.rival_kl, also.rival_kl_stderr)}"
    if also.difference is not None:
        text += f", paired difference {with_error(also.difference, also.difference_stderr, True)}"
    return text


def rounding(plan: Plan) -> str:
    """The rounding method in words, and what it bought."""
    if plan.rounding == "rtn":
        return "to nearest (rtn)"
    if not plan.nearest_kl:
        return plan.rounding
    nearest = number(sum(plan.nearest_kl.values()))
    return f"{plan.rounding}; the same formats rounded to nearest: KL {nearest} predicted"


def _time(plan: Plan) -> list[tuple[str, str]]:
    """How long a step takes on the device that was named, and how sure that is."""
    latency = plan.latency
    if latency is None:
        return []
    words = words_of(plan.calibration)
    step = f"per {words.one}"
    if latency.tokens > 1:
        step = f"per step of {latency.tokens:,} {words.many}"
    text = f"{milliseconds(latency.ms)} {step} in the planned matrices, on {latency.device}"
    if latency.max_ms is not None:
        asked = "the fastest" if plan.goal == "speed" else f"at most {latency.max_ms:g} ms"
        text += f" ({asked})"
    if latency.sureness == "measured":
        return [("time", f"{text}; summed from measured times")]
    return [("time", text), ("time is a model", latency.sureness)]


def milliseconds(ms: float) -> str:
    """``0.8771 ms``."""
    return f"{ms:.4g} ms"


def _memory(plan: Plan) -> list[tuple[str, str]]:
    """A planned KV cache, and what shares the memory with it."""
    cache = plan.kv_cache
    if cache is None:
        return []
    layers = Counter(cache.bits.values())
    (bits, count), *fewer = sorted(layers.items(), reverse=True)
    share = f"{count}" if fewer else f"all {count}"
    widths = f"{bits} bits in {share} {'layer' if count == 1 else 'layers'}"
    widths += "".join(f", {bits} bits in {count}" for bits, count in fewer)
    size = f"{format_bytes(cache.bytes)} at {cache.context:,} tokens × {cache.batch}"
    weights = format_bytes(plan.bytes)
    if plan.resident_bytes is not None:
        weights = f"{format_bytes(plan.resident_bytes)} as laid out ({weights} stored)"
    parts = [f"weights {weights}", f"KV cache {format_bytes(cache.bytes)}"]
    used, asked = plan.total_bytes, ""
    if (memory := plan.budget.memory) is not None:
        rest = memory - plan.budget.bytes
        used, asked = used + rest, f"{format_bytes(memory)} asked, "
        parts.append(f"rest of the model {format_bytes(rest)}")
    return [
        ("KV cache", f"{widths}; {size}"),
        ("memory", f"{asked}{format_bytes(used)} used: {', '.join(parts)}"),
    ]


def measured_on(row: Comparison, many: str) -> str:
    """``on 1,024 tokens``, of a plan that was so far behind there; empty for all others."""
    return f"on {row.tokens:,} {many}" if row.tokens else ""


def describe_rival(rival: Comparison, many: str) -> str:
    """A rival in words: format, size, KL, how much worse it is; ``many`` is what a KL is over."""
    name = f"{rival.label}, {format_bytes(rival.bytes)}"
    if rival.ms is not None:
        name += f", {milliseconds(rival.ms)}"
    if rival.kl is None:
        return f"{name}: KL {number(rival.predicted_kl)} predicted"
    text = f"{name}: KL {with_error(rival.kl, rival.kl_stderr)} measured"
    if few := measured_on(rival, many):
        text += f" {few}"
    if rival.difference is not None:
        text += f", paired difference {with_error(rival.difference, rival.difference_stderr, True)}"
    return text
