"""A made-up run whose prices behave like a language model's, for tests of what shows runs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np

from bitplan.jobs.job import Job
from bitplan.jobs.settings import ProfileSettings, SearchSettings
from bitplan.models.units import UnitInfo
from bitplan.quantizers.format import Format
from bitplan.search.confidence import Confidence
from bitplan.search.frontier import Frontier
from bitplan.search.limits import Limits, build_problem
from bitplan.search.plan import Baseline, Measured, Plan
from bitplan.search.solve import solve
from bitplan.sensitivity.provenance import ModelRef, Provenance
from bitplan.sensitivity.table import SensitivityTable

FORMATS = tuple(f"int{bits}-g{group}-asym" for group in (64, 128) for bits in (2, 3, 4, 5, 6, 8))
_MATRICES = {  # SmolLM2-135M, per layer
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}
_PROVENANCE = Provenance(
    model=ModelRef(id="example/tiny-135m", sha256="5af571cb" * 8),
    metric="fisher",
    rounding="rtn",
    calibration={
        "source": "builtin",
        "sequences": 96,
        "length": 128,
        "seed": 0,
        "sha256": "0d1e2f3a" * 8,
    },
    versions={"bitplan": "0.1.0", "torch": "2.13.0"},
)


def transformer_units(layers: int, embedding: bool = False) -> tuple[UnitInfo, ...]:
    """The matrices of a small language model, optionally with its tied embedding."""
    units = [
        UnitInfo(f"model.layers.{i}.{kind}", (f"model.layers.{i}.{kind}",), (shape,), kind, i)
        for i in range(layers)
        for kind, shape in _MATRICES.items()
    ]
    if embedding:
        name = "model.embed_tokens"
        shape = (49152, 576)
        units.insert(0, UnitInfo(name, (name,), (shape,), "embed_tokens", None, ("lm_head",)))
    return tuple(units)


def flat_units() -> tuple[UnitInfo, ...]:
    """A small convolutional network: five units without layers."""
    shapes = {
        "stem.conv": (16, 27),
        "block1.conv": (32, 144),
        "block2.conv": (64, 288),
        "block3.conv": (64, 576),
        "head": (10, 1024),
    }
    return tuple(UnitInfo(name, (name,), (shape,), name) for name, shape in shapes.items())


def fake_table(
    units: tuple[UnitInfo, ...], formats: tuple[str, ...] = FORMATS, seed: int = 0
) -> SensitivityTable:
    """Prices that fall fourfold per bit and differ between units; int4 everywhere costs 0.33."""
    random = np.random.default_rng(seed)
    parsed = [Format.parse(name) for name in formats]
    nbytes = [[sum(f.stored_bytes(s) for s in unit.shapes) for f in parsed] for unit in units]
    weights = np.array([unit.weights for unit in units])
    level = np.sqrt(weights) * random.lognormal(0, 1.0, len(units))
    level *= 0.33 / level.sum()
    group = np.array([1.0 if f.group_size == 64 else 1.25 for f in parsed])
    noise = random.lognormal(0, 0.08, (len(units), len(formats)))
    kl = level[:, None] * noise * group * 4.0 ** (4 - np.array([f.bits for f in parsed]))
    kl[:, [f.floating for f in parsed]] = 0.0
    return SensitivityTable(
        units=units,
        formats=formats,
        bytes=np.array(nbytes, dtype=np.int64),
        kl=kl,
        stderr=0.14 * kl,
        provenance=_PROVENANCE,
    )


def measure(plan: Plan, frontier: Frontier) -> Plan:
    """Pretend that the plan and the uniform plans within its budget were measured."""
    kl = 1.05 * plan.predicted_kl
    return plan.model_copy(
        update={
            "measured": Measured(
                kl=kl,
                kl_stderr=0.02 * kl,
                ppl=30.5 * (1 + kl),
                ppl_original=30.5,
                tokens=16384,
                length=512,
                text="wikitext-2/test.txt",
                text_sha256="12ab34cd" * 8,
            ),
            "baselines": [
                Baseline(
                    name=f"uniform {point.name}",
                    format=point.name,
                    bytes=point.bytes,
                    predicted_kl=point.predicted_kl,
                    kl=0.95 * point.predicted_kl,
                    kl_stderr=0.02 * point.predicted_kl,
                    ppl=30.5 * (1 + 0.95 * point.predicted_kl),
                    difference=0.95 * point.predicted_kl - kl,
                    difference_stderr=0.015 * point.predicted_kl,
                )
                for point in frontier.uniform
                if point.bytes <= plan.budget.bytes
            ],
        }
    )


def fake_confidence(plan: Plan, table: SensitivityTable, seed: int = 0) -> Confidence:
    """A made-up bootstrap of a plan."""
    random = np.random.default_rng(seed)
    chosen = [plan.assignments[unit.modules[0]] for unit in table.units]
    agreement = np.round(1 - random.beta(1, 4, len(chosen)), 2)
    return Confidence(
        units=tuple(unit.name for unit in table.units),
        plan=tuple(chosen),
        agreement=agreement,
        runner_up=tuple(next(f for f in table.formats if f != name) for name in chosen)
        if len(table.formats) > 1
        else ("",) * len(chosen),
        more_sequences=np.where(agreement < 0.6, np.inf, np.where(agreement < 0.9, 40.0, 0.0)),
        optimism=0.004,
        sequences=96,
        resamples=200,
        seed=0,
    )


def fake_run(
    folder: Path,
    units: tuple[UnitInfo, ...] | None = None,
    *,
    formats: tuple[str, ...] = FORMATS,
    budget: str = "4.3bpw",
    measured: bool = True,
    search: SearchSettings | None = None,
    confidence: bool = False,
) -> Path:
    """Write the files of a made-up run; returns the folder.

    Args:
        folder: The run folder.
        units: Three layers of a small language model by default.
        formats: The formats priced.
        budget: The budget; that of ``search`` counts if there is one.
        measured: Whether the plan was measured.
        search: What ``job.json`` says was asked for; without it there is no such file.
        confidence: Whether there is a bootstrap.
    """
    table = fake_table(units or transformer_units(3), formats)
    limits = search.limits() if search else Limits()
    seen = limits.for_runtime(table)
    if search:
        budget = search.budget or budget
        asked = {"profile": asdict(ProfileSettings("tiny")), "search": asdict(search)}
        with Job(folder, ["bitplan", "search", "tiny", "--budget", budget], asked) as job:
            for name in ("profile", "solve", "validate"):
                with job.stage(name):
                    pass
    plan = solve(table, budget, limits=limits, command=f"bitplan search tiny --budget {budget}")
    frontier = Frontier.from_problem(build_problem(seen, limits), plan.model)
    if measured:
        plan = measure(plan, frontier)
    folder.mkdir(parents=True, exist_ok=True)
    table.save(folder / "profile.safetensors")
    frontier.save(folder / "frontier.json")
    plan.save(folder / "plan.json")
    if confidence:
        fake_confidence(plan, table).save(folder / "confidence.json")
    return folder
