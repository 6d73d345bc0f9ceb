"""Refinement on true KL: the plan after every accepted step, and the work it took."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from bitplan.benchmarks.search_lab import (
    BUDGETS,
    LENGTH,
    MEASURED_AT_ONCE,
    Lab,
    Part,
    Row,
    ratio,
    target,
)
from bitplan.benchmarks.search_rivals import table_of
from bitplan.jobs.folder import RunFolder
from bitplan.jobs.truth import Truth
from bitplan.models.samples import Samples
from bitplan.search.oracle import Choice
from bitplan.search.problem import Problem
from bitplan.search.refine import LocalPrices, Step, refine
from bitplan.search.solvers import SOLVERS

STEPS = {"3.28bpw": 2, "4.3bpw": 1}
BATCH_TOKENS = 1536  # larger than the default: faster, and the prices are the same
PROFILE_PASSES = 3  # forward = 1, backward = 2
LINEARIZE_PASSES = 6  # forward of the original and of the plan, and two backward passes
TARGETS = {"3.28bpw": ("uniform", "<= 0.6"), "4.3bpw": ("one shot", "<= 1")}


@dataclass(frozen=True, slots=True)
class Trajectory:
    """A refinement.

    Attributes:
        choices: intp [U] each, the one-shot plan and the plan after every accepted step.
        kl: Their KL on the guard sequences, nats per token.
        tokens: Tokens through the model when each was found.
        total: Tokens in all, with the steps that did not help.
        steps: All measured candidates.
    """

    choices: list[Choice]
    kl: list[float]
    tokens: list[int]
    total: int
    steps: list[Step]


def refinement(lab: Lab) -> Part:
    """Refine the one-shot plan at every budget and measure every accepted step."""
    tables: dict[str, list[Row]] = {}
    candidates: list[Row] = []
    targets = []
    for budget, name in BUDGETS.items():
        trajectory = refined(lab, budget, STEPS[budget])
        measured = lab.measure({"uniform": lab.uniform(budget)} | named_plans(trajectory))
        references = {key: measured[key] for key in ("uniform", "one shot")}
        rows = []
        for i, (plan, choice) in enumerate(named_plans(trajectory).items()):
            result = measured[plan]
            row: Row = {
                "plan": plan,
                "bpw": lab.bpw(choice),
                "tokens": trajectory.tokens[i],
                "guard KL": trajectory.kl[i],
                "KL": result.mean_kl,
                "± stderr": result.kl_stderr,
            }
            for key, reference in references.items():
                column = f"KL / {name if key == 'uniform' else key}"
                row[column], row[f"± of KL / {key}"] = ratio(result.kl, reference.kl)
            rows.append(row)
        tables[f"Refinement at {budget}"] = rows
        candidates += [_candidate(budget, step) for step in trajectory.steps]
        key, wanted = TARGETS[budget]
        text = f"{budget}: KL of the refined plan / {name if key == 'uniform' else 'one-shot plan'}"
        targets.append(target(text, wanted, *ratio(result.kl, references[key].kl)))
    tables["Candidates of the refinement"] = candidates
    note = (
        "Refinement: from the certified plan of `fisher` (seed 0); at most "
        + ", ".join(f"{count} steps at {budget}" for budget, count in STEPS.items())
        + f". Prices come from the profile's {lab.settings.sequences} sequences, candidates are "
        f"measured on {_guard(lab).count} others of the same text (KL over the 1,024 likeliest "
        "tokens and the rest; differences are to the plan before, paired). KL is the full KL on "
        "the test text, which no step has seen."
    )
    return Part(tables, targets, [note])


def refined(lab: Lab, budget: str, steps: int) -> Trajectory:
    """Refine the one-shot plan at a budget, from figures in the work folder where there are."""
    table = table_of(lab, "fisher", 0)
    problem, max_bytes = Problem.from_table(table), lab.max_bytes(budget)
    start = SOLVERS.get("certified")(problem, max_bytes).choice
    truth = truth_of(lab, _guard(lab))
    oracle = truth.oracle(sys.maxsize)
    calibration = lab.settings.sequences * LENGTH
    work = PROFILE_PASSES * calibration
    tokens = [work]

    def linearize(choice: Choice, number: int) -> LocalPrices:
        nonlocal work
        work += LINEARIZE_PASSES * calibration
        return truth.linearize(choice, number)

    def report(step: Step) -> None:
        if step.accepted:
            tokens.append(work + oracle.tokens)
        lab.reporter.say(
            f"{budget}, step {step.number}: {step.changed} units changed at multiplier "
            f"{step.multiplier:g}, KL {step.difference:+.4f} ± {step.difference_stderr:.4f}"
            + (", accepted" if step.accepted else "")
        )

    found = refine(problem, max_bytes, start, linearize, oracle, steps=steps, report=report)
    return Trajectory(found.choices, found.kl, tokens, work + oracle.tokens, found.steps)


def truth_of(lab: Lab, sequences: Samples) -> Truth:
    """True KL on some sequences, and prices from those of the profile; kept in the work folder."""
    folder = lab.work / "truth"
    folder.mkdir(parents=True, exist_ok=True)
    table = table_of(lab, "fisher", 0)
    samples = lab.calibration(0, batch_tokens=BATCH_TOKENS)
    return Truth(
        lab.model, lab.renderer, table, samples, sequences, RunFolder(folder), 0, lab.reporter
    )


def all_sequences(lab: Lab) -> Samples:
    """The profile's sequences and the guard's: what a search without prices may measure on."""
    count = lab.settings.sequences + _guard(lab).count
    together = lab.calibration(0, sequences=count, batch_tokens=MEASURED_AT_ONCE)
    apart = (lab.calibration(0), _guard(lab))
    assert torch.equal(_ids(together), torch.cat([_ids(samples) for samples in apart]))
    return together


def named_plans(trajectory: Trajectory) -> dict[str, Choice]:
    """The plans of a refinement by name."""
    return {f"step {i}" if i else "one shot": c for i, c in enumerate(trajectory.choices)}


def _guard(lab: Lab) -> Samples:
    count = lab.settings.sequences
    return lab.calibration(0, skip=count, sequences=2 * count // 3, batch_tokens=MEASURED_AT_ONCE)


def _ids(samples: Samples) -> Tensor:
    """All token ids [sequences, tokens]."""
    return torch.cat([batch for batch in samples.batches if isinstance(batch, Tensor)])


def _candidate(budget: str, step: Step) -> Row:
    return {
        "budget": budget,
        "step": step.number,
        "multiplier": step.multiplier,
        "units changed": step.changed,
        "predicted difference": step.predicted,
        "measured difference": step.difference,
        "± stderr": step.difference_stderr,
        "accepted": step.accepted,
    }
