"""What was priced is what is measured, packed and exported, whatever method rounds."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bitplan._base.progress import Reporter
from bitplan.exporters.configs.folder import TensorFiles
from bitplan.exporters.configs.gptq import PARTS
from bitplan.exporters.export import export
from bitplan.exporters.layouts.packing import from_gptq
from bitplan.exporters.source import open_source
from bitplan.jobs.folder import RunFolder
from bitplan.jobs.held_out import run_eval
from bitplan.jobs.materialize import apply, load, quantize
from bitplan.jobs.prepare import prepare
from bitplan.jobs.search import run_search
from bitplan.jobs.settings import ProfileSettings, SearchSettings
from bitplan.models.load import load_model
from bitplan.quantizers.checkpoint import read_checkpoint
from bitplan.quantizers.format import Format
from bitplan.quantizers.grid import Grid
from bitplan.quantizers.methods import METHODS, Evidence
from bitplan.quantizers.packed import PackedTensor
from bitplan.search.plan import Plan
from bitplan.search.solve import solve
from bitplan.sensitivity.estimate import profile

QUIET = Reporter(quiet=True)
FORMATS = ("int2-g64", "int3-g64-asym", "int4-g64", "bf16")
Fits = Counter[tuple[int, str]]


@pytest.fixture
def gptq_calls(monkeypatch: pytest.MonkeyPatch) -> Fits:
    """Counts the calls of GPTQ for every weight and format from here on."""
    counted: Fits = Counter()
    method = METHODS.get("gptq")

    def counting(weight: Tensor, fmt: Format, evidence: Evidence) -> PackedTensor:
        counted[hash(weight.numpy().tobytes()), fmt.name] += 1
        return method(weight, fmt, evidence)

    monkeypatch.setitem(METHODS._found, "gptq", counting)
    return counted


@pytest.fixture
def grid_fits(monkeypatch: pytest.MonkeyPatch) -> Fits:
    """Counts the fits of round-to-nearest's grids from here on."""
    counted: Fits = Counter()
    fit = METHODS.trait("rtn", "grid")

    def counting(weight: Tensor, fmt: Format) -> Grid | None:
        counted[weight.data_ptr(), fmt.name] += 1
        found: Grid | None = fit(weight, fmt)
        return found

    monkeypatch.setitem(METHODS._traits, "rtn", {"grid": counting})
    return counted


def settings(model: Path, rounding: str = "gptq", **changed: object) -> ProfileSettings:
    given: dict[str, object] = {
        "formats": FORMATS,
        "sequences": 8,
        "length": 32,
        "rounding_sequences": 8,
        "calibration": "builtin",
    }
    given |= changed
    return ProfileSettings(str(model), rounding=rounding, **given)  # type: ignore[arg-type]


SEARCH = SearchSettings(budget="3.9bpw", refine=1, guard=8, eval_tokens=256, bootstrap=0)


@pytest.fixture(scope="module")
def searched(
    tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, Plan]]:
    run = tmp_path_factory.mktemp("runs") / "gptq"
    yield run, run_search(settings(tiny_folder), SEARCH, run, QUIET)


def priced(run: Path, model: Path) -> dict[str, PackedTensor]:
    """What the store of the run holds of its plan."""
    plan = Plan.load(run / "plan.json")
    store = prepare(settings(model), QUIET, RunFolder(run)).renderer.store
    return {name: store.packed(name, Format.parse(f)) for name, f in plan.assignments.items()}


def same(found: PackedTensor, expected: PackedTensor) -> bool:
    pairs = zip(found.tensors.values(), expected.tensors.values(), strict=True)
    return found.fmt == expected.fmt and all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("layers", [5])
def test_a_search_fits_each_matrix_and_format_once(
    tiny_folder: Path, tmp_path: Path, grid_fits: Fits, layers: int
) -> None:
    folder = deeper(tiny_folder, tmp_path / "model", layers)
    run_search(settings(folder, "rtn"), SEARCH, tmp_path / "run", QUIET)
    assert len(grid_fits) == (7 * layers + 1) * len(FORMATS)
    assert set(grid_fits.values()) == {1}


def test_a_search_calls_gptq_once_per_matrix_and_format(
    tiny_folder: Path, tmp_path: Path, gptq_calls: Fits
) -> None:
    layers, run = 5, tmp_path / "run"
    folder = deeper(tiny_folder, tmp_path / "model", layers)
    plan = run_search(settings(folder), SEARCH, run, QUIET)
    quantize(run / "plan.json", tmp_path / "packed")
    export(run, "json", tmp_path / "plan-export.json", plan_only=True)
    assert plan.rounding == "gptq"
    assert len(gptq_calls) == (7 * layers + 1) * 3  # bf16 is only a cast
    assert set(gptq_calls.values()) == {1}


def test_packed_and_exported_codes_are_those_that_were_priced(
    searched: tuple[Path, Plan], tiny_folder: Path, tmp_path: Path, gptq_calls: Fits
) -> None:
    run, plan = searched
    expected = priced(run, tiny_folder)
    packed, _, _ = read_checkpoint(quantize(run / "plan.json", tmp_path / "packed"))
    assert packed.keys() == expected.keys() == plan.assignments.keys()
    assert all(same(packed[name], expected[name]) for name in expected)
    source = open_source(run)
    assert all(same(weight, expected[name]) for name, weight in source.each())
    assert not gptq_calls, "taken from the run's folder, not rounded again"
    nearest = METHODS.get("rtn")
    weights = {
        name: load_model(str(tiny_folder), "cpu").module.get_parameter(f"{name}.weight")
        for name in expected
    }
    others = [
        n
        for n in expected
        if not same(expected[n], nearest(weights[n], expected[n].fmt, Evidence()))
    ]
    assert len(others) >= 10, "GPTQ's codes are not the nearest"


def test_a_gptq_folder_holds_those_codes(
    searched: tuple[Path, Plan], tiny_folder: Path, tmp_path: Path, gptq_calls: Fits
) -> None:
    run, _ = searched
    done = export(run, "gptq", tmp_path / "gptq", round_up=True)
    rounded = {name for name, spec in done.changed.items() if spec != "bf16"}
    assert len(gptq_calls) == len(rounded)  # rows of 160 are no multiple of 64
    files = TensorFiles(tmp_path / "gptq")
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]
    compared = 0
    for name, expected in priced(run, tiny_folder).items():
        if name in done.changed:
            continue
        tensors = files.parts(name, PARTS)
        found = from_gptq(tensors, expected.fmt, config["checkpoint_format"] == "gptq")
        assert torch.equal(found.dequantize(), expected.dequantize())
        compared += 1
    assert compared >= 10


def test_the_packed_model_computes_what_was_measured(
    searched: tuple[Path, Plan], tmp_path: Path
) -> None:
    run, plan = searched
    assert plan.measured is not None
    again, found, _ = run_eval(run, "builtin", None, "cpu", QUIET)
    assert again == plan
    assert found.mean_kl == pytest.approx(plan.measured.kl, rel=1e-4)
    quantize(run / "plan.json", tmp_path / "packed")
    _, packed, _ = run_eval(tmp_path / "packed", "builtin", None, "cpu", QUIET)
    assert packed.mean_kl == pytest.approx(plan.measured.kl, rel=1e-3)


def test_gptq_measures_better_than_nearest_at_equal_bytes(
    searched: tuple[Path, Plan], tiny_folder: Path, tmp_path: Path
) -> None:
    _, plan = searched
    nearest = run_search(settings(tiny_folder, "rtn"), SEARCH, tmp_path / "rtn", QUIET)
    kl = {
        p.rounding: {b.name: b.kl for b in p.baselines}.get("uniform int3-g64-asym")
        for p in (plan, nearest)
    }
    assert kl["gptq"] is not None and kl["rtn"] is not None
    assert kl["gptq"] < kl["rtn"]


def test_a_copied_plan_is_rounded_again_to_the_same_codes(
    searched: tuple[Path, Plan], tiny_folder: Path, tmp_path: Path, gptq_calls: Fits
) -> None:
    run, plan = searched
    expected = priced(run, tiny_folder)
    shutil.copy(run / "plan.json", tmp_path / "plan.json")
    packed, _, _ = read_checkpoint(quantize(tmp_path / "plan.json", tmp_path / "packed"))
    assert all(same(packed[name], expected[name]) for name in expected)
    assert len(gptq_calls) == sum(f != "bf16" for f in plan.assignments.values())


def test_other_codes_than_those_priced_are_refused(
    searched: tuple[Path, Plan], tmp_path: Path
) -> None:
    _, plan = searched
    assert plan.codes_sha256 is not None
    other = plan.model_copy(update={"codes_sha256": "0" * 64})
    with pytest.raises(ValueError, match="does not give the codes that were priced"):
        quantize(other, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_without_the_calibration_text_nothing_is_rounded_again(
    searched: tuple[Path, Plan], tmp_path: Path
) -> None:
    _, plan = searched
    calibration = plan.calibration | {"source": "gone.txt"}
    lost = plan.model_copy(update={"calibration": calibration})
    with pytest.raises(
        ValueError, match=r"rounded by 'gptq' on 8 sequences of 'gone.txt'.*not found"
    ):
        quantize(lost, tmp_path / "packed")
    unlike = plan.calibration | {"rounding_sha256": "0" * 64}
    other = plan.model_copy(update={"calibration": unlike})
    with pytest.raises(ValueError, match="is another text"):
        quantize(other, tmp_path / "packed")


def test_a_text_is_found_by_the_command_that_named_it(
    tiny_folder: Path, tmp_path: Path, searched: tuple[Path, Plan]
) -> None:
    text = tmp_path / "some" / "text.txt"
    text.parent.mkdir()
    text.write_text("The model stores a scale for every row of every weight. " * 300)
    command = f"bitplan search {tiny_folder} --budget 3.9bpw --calibration {text} --rounding gptq"
    plan = run_search(
        settings(tiny_folder, calibration=str(text)),
        SearchSettings(budget="3.9bpw", refine=0, eval_tokens=256, bootstrap=0, command=command),
        tmp_path / "run",
        QUIET,
    )
    assert plan.calibration["source"] == "text.txt"
    quantize(plan, tmp_path / "packed")
    shutil.rmtree(tmp_path / "run" / "renderings")
    plan.model_copy(update={"command": None}).save(tmp_path / "run" / "plan.json")
    quantize(tmp_path / "run" / "plan.json", tmp_path / "packed")


def test_several_texts_are_found_again_with_their_weights(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "some"
    folder.mkdir()
    text = folder / "text, 2:1.txt"
    text.write_text("The model stores a scale for every row of every weight. " * 300)
    source = f"mixture:0.6,{text}:0.4"
    search = SearchSettings(budget="3.9bpw", refine=0, eval_tokens=256, bootstrap=0)
    plan = run_search(settings(tiny_folder, calibration=source), search, tmp_path / "run", QUIET)
    assert plan.calibration["texts"][-1] == {"source": text.name, "weight": 0.4}
    with pytest.raises(ValueError, match="not found"):
        quantize(plan, tmp_path / "packed")
    monkeypatch.chdir(folder)
    quantize(plan, tmp_path / "packed")
    other = [*plan.calibration["texts"][:-1], {"source": text.name, "weight": 0.2}]
    wrong = plan.model_copy(update={"calibration": plan.calibration | {"texts": other}})
    with pytest.raises(ValueError, match="is another text"):
        quantize(wrong, tmp_path / "packed-2")


def test_the_plan_of_a_search_knows_a_second_text(searched: tuple[Path, Plan]) -> None:
    run, plan = searched
    [also] = Plan.load(run / "plan.json").measured_also
    assert plan.measured is not None
    assert (plan.measured.text, plan.measured.tokens) == ("builtin", 256)
    assert (also.text, also.tokens) == ("code", 64)
    assert also.kl > 0 and also.text_sha256 != plan.measured.text_sha256
    fitting = [b for b in plan.baselines if b.format and b.bytes <= plan.budget.bytes]
    assert also.rival == (min(fitting, key=lambda b: b.kl).format if fitting else None)
    assert RunFolder(run).measurements_also.is_file()


def test_a_killed_run_rounds_nothing_twice(
    tiny_folder: Path, tmp_path: Path, gptq_calls: Fits, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, counted = tmp_path / "run", METHODS._found["gptq"]

    def dying(weight: Tensor, fmt: Format, evidence: Evidence) -> PackedTensor:
        if len(gptq_calls) == 20:
            raise KeyboardInterrupt
        return counted(weight, fmt, evidence)

    monkeypatch.setitem(METHODS._found, "gptq", dying)
    with pytest.raises(KeyboardInterrupt):
        run_search(settings(tiny_folder), SEARCH, run, QUIET)
    assert 20 <= sum(gptq_calls.values()) < 45
    monkeypatch.setitem(METHODS._found, "gptq", counted)
    run_search(settings(tiny_folder), SEARCH, run, QUIET)
    run_search(settings(tiny_folder), SEARCH, run, QUIET)
    assert len(gptq_calls) == 15 * 3
    assert set(gptq_calls.values()) == {1}


def test_a_module_of_ones_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 9)).requires_grad_(False).eval()
    batches = [torch.randn(16, 64) @ torch.randn(64, 64) for _ in range(3)]
    table = profile(net, batches, FORMATS, rounding="gptq")
    plan = solve(table, "3.5bpw")
    with pytest.raises(ValueError, match="'gptq' on 16 sequences of 'batches'"):
        apply(net, plan)
    with pytest.raises(ValueError, match="those given are others"):
        apply(net, plan, batches[1:2])
    before = net(batches[0])
    apply(net, plan, batches)
    assert not torch.equal(net(batches[0]), before)


def deeper(model: Path, to: Path, layers: int) -> Path:
    """The tiny model with its layers repeated."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    loaded = LlamaForCausalLM.from_pretrained(model)
    config = loaded.config
    config.num_hidden_layers = layers
    made = LlamaForCausalLM(config)
    made.model.embed_tokens.load_state_dict(loaded.model.embed_tokens.state_dict())
    made.save_pretrained(to)
    AutoTokenizer.from_pretrained(model).save_pretrained(to)
    return to


def test_a_folder_of_codes_alone_loads(searched: tuple[Path, Plan], tmp_path: Path) -> None:
    run, _ = searched
    model = load(quantize(run / "plan.json", tmp_path / "packed"))
    assert torch.isfinite(model(input_ids=torch.arange(8)[None]).logits).all()
