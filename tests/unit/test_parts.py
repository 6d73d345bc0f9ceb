"""Matrices of which some rows have another format than the others, from plan to product."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import bitplan
from bitplan._base.progress import Reporter
from bitplan.exporters.checks import snap, violations
from bitplan.exporters.export import export
from bitplan.jobs.held_out import run_eval
from bitplan.jobs.materialize import assignment_formats, planned_units
from bitplan.models.find import find_matrices, find_units
from bitplan.models.packed_rows import PackedRows, PackedRowsLinear
from bitplan.models.packing import replace
from bitplan.models.rendering import Renderer
from bitplan.models.units import Ranges, part_name, split_rows, whole_matrices
from bitplan.models.workload import LoadedModel
from bitplan.quantizers.checkpoint import FILE_NAME, planned_bytes, stored_rows, write_checkpoint
from bitplan.quantizers.format import Format
from bitplan.quantizers.methods import METHODS
from bitplan.quantizers.packed import PackedTensor
from bitplan.quantizers.runtimes import Rules
from bitplan.search.plan import Plan
from bitplan.testing.plans import hand_made

UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"
EMBED, QUERY = "model.embed_tokens", "model.layers.1.self_attn.q_proj"
ROWS: dict[str, list[Ranges]] = {  # of matrices [512, 256], [256, 512], [512, 256] and [256, 256]
    UP: [((0, 128), (256, 320)), ((128, 256), (320, 512))],
    DOWN: [((3, 5),), ((0, 3), (5, 100)), ((100, 200),), ((200, 256),)],
    EMBED: [((0, 10), (500, 512)), ((10, 500),)],
    QUERY: [((128, 256),), ((0, 128),)],
}
FORMATS = {
    UP: ["int4-g64", "int3-g64"],
    DOWN: ["bf16", "nf4-g64", "int3-g64-asym+lr4", "q4_k"],
    EMBED: ["fp16", "int5-g32"],
    QUERY: ["int4-g128-asym", "int2-gc"],
}
ROW_SETS = {part_name(name, i): some for name in ROWS for i, some in enumerate(ROWS[name])}
ASSIGNMENTS = {part_name(name, i): fmt for name in FORMATS for i, fmt in enumerate(FORMATS[name])}
ROW_SETS_OF_UP = {name: rows for name, rows in ROW_SETS.items() if name.startswith(UP)}
WHOLE = {"model.layers.0.mlp.gate_proj": "int4-g64", "lm_head": "int6-g64"}
IDS = torch.arange(40).view(2, 20)


@pytest.fixture(scope="module")
def plan(wide: LoadedModel) -> Plan:
    return hand_made(wide, ASSIGNMENTS | WHOLE, row_sets=ROW_SETS)


@pytest.fixture(scope="module")
def folder(wide: LoadedModel, plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bitplan.quantize(plan, tmp_path_factory.mktemp("parts") / "packed", wide)


@pytest.fixture(scope="module")
def reference(wide: LoadedModel, plan: Plan) -> Tensor:
    """The logits of the model with plain numbers in place of its weights."""
    model = copy.deepcopy(wide.module)
    store = Renderer(wide.module, planned_units(wide.module, plan)).store
    for name, fmt in assignment_formats(plan).items():
        weight = model.get_submodule(name.partition("[")[0]).weight
        assert isinstance(weight, nn.Parameter)
        rows = ROW_SETS.get(name, ((0, len(weight)),))
        indices = torch.cat([torch.arange(start, stop) for start, stop in rows])
        weight.data[indices] = store.packed(name, fmt).dequantize()
    with torch.no_grad():
        logits: Tensor = model(IDS).logits
    return logits


def near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


def test_applied_loaded_and_rendered_are_the_dequantized_model(
    wide: LoadedModel, plan: Plan, folder: Path, reference: Tensor
) -> None:
    applied = bitplan.apply(copy.deepcopy(wide.module), plan)
    loaded = bitplan.load(folder)
    renderer = Renderer(wide.module, planned_units(wide.module, plan))
    with torch.no_grad(), renderer.applied(assignment_formats(plan)):
        near(wide.logits(IDS), reference)
    with torch.no_grad():
        near(applied(IDS).logits, reference)
        near(loaded(IDS).logits, reference)
        original = wide.logits(IDS)
    assert (original - reference).abs().max() > 0.01 * original.abs().max()
    for name in (UP, DOWN, QUERY):
        assert isinstance(loaded.get_submodule(name), PackedRowsLinear)
    embedding = loaded.get_submodule(EMBED)._modules["weight"]
    assert isinstance(embedding, PackedRows)
    assert [m.fmt.name for m in embedding.modules_of_parts()] == FORMATS[EMBED]


def test_measured_by_eval_as_planned(plan: Plan, folder: Path, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    quiet = Reporter(quiet=True)
    kl = [run_eval(each, "builtin", 512, "cpu", quiet)[1].mean_kl for each in (tmp_path, folder)]
    assert kl[0] == pytest.approx(kl[1], rel=1e-3)
    assert kl[0] > 1e-4


def test_bytes_are_those_of_the_file(plan: Plan, folder: Path) -> None:
    assert plan.bytes == planned_bytes(folder)
    with safe_open(folder / FILE_NAME, "pt") as file:
        sizes = {name: file.get_tensor(name).nbytes for name in file.keys()}  # noqa: SIM118
        assert (file.metadata() or {})["bitplan_version"] == "3"
    inside = tuple(f"{name}." for name in plan.assignments)
    assert sum(size for name, size in sizes.items() if name.startswith(inside)) == plan.bytes
    assert f"{UP}[rows:0].codes" in sizes
    assert not any(name.startswith((f"{UP}.", f"{EMBED}.")) for name in sizes)
    assert stored_rows(folder) == ROW_SETS


def test_files_without_parts_stay_readable_by_earlier_versions(tmp_path: Path) -> None:
    fmt = Format.parse("int4-g64")
    weight = torch.randn(4, 64)
    packed = PackedTensor.pack(weight, fmt, METHODS.trait("rtn", "grid")(weight, fmt))
    write_checkpoint(tmp_path, {"layer": packed}, {}, {})
    with safe_open(tmp_path / FILE_NAME, "pt") as file:
        assert (file.metadata() or {})["bitplan_version"] == "2"


def test_a_plan_with_parts_reads_back(plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == plan
    assert again.row_ranges == ROW_SETS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{UP}[rows:0]": None}, r"up_proj\[rows:0\]: row_sets does not say which rows"),
        (
            {f"{UP}[rows:0]": (UP, [])},
            r"up_proj\[rows:0\]: rows are ranges.*, not \[\]",
        ),
        ({f"{UP}[rows:0]": (UP, [(5, 9), (6, 7)])}, r"do not overlap.*\[\(5, 9\), \(6, 7\)\]"),
        ({f"{UP}[rows:0]": (DOWN, [(0, 192)])}, "a part of 'model.layers.1.mlp.down_proj' has"),
        ({f"{UP}[rows:0]": (UP, [(0, 130), (256, 320)])}, "share rows 128 to 129"),
        ({f"{UP}[rows:7]": (UP, [(512, 513)])}, r"up_proj\[rows:7\]: it has no format"),
    ],
)
def test_a_plan_with_damaged_rows_is_refused(
    plan: Plan, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    plan.save(path)
    data = json.loads(path.read_text())
    for name, value in change.items():
        if value is None:
            del data["row_sets"][name]
        else:
            data["row_sets"][name] = {"module": value[0], "rows": value[1]}
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=f"plan.json is not a valid plan.*{message}"):
        Plan.load(path)


def test_rows_that_are_not_those_of_the_matrix(wide: LoadedModel, plan: Plan) -> None:
    for stop, message in ((511, "lack rows 511 to 511"), (513, "have row 512")):
        rows = {"module": UP, "rows": [(128, 256), (320, stop)]}
        changed = plan.model_dump(by_alias=True)
        changed["row_sets"][f"{UP}[rows:1]"] = rows
        with pytest.raises(ValueError, match=f"'{UP}', which has rows 0 to 511, {message}"):
            planned_units(wide.module, Plan.model_validate(changed))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (None, r"does not say which rows of its matrix 'model.layers.0.mlp.up_proj\[rows:0\]'"),
        ([[0, 128]], r"up_proj\[rows:0\]' has 192 rows, but says it is rows \[\[0, 128\]\]"),
        ([[0, 192]], "is not the plan"),
    ],
)
def test_a_file_with_damaged_rows_is_refused(
    folder: Path, rows: Any, message: str, tmp_path: Path
) -> None:
    with safe_open(folder / FILE_NAME, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = dict(file.metadata() or {})
    content = json.loads(metadata["bitplan"])
    if rows is None:
        del content["modules"][f"{UP}[rows:0]"]["rows"]
    else:
        content["modules"][f"{UP}[rows:0]"]["rows"] = rows
    save_file(tensors, tmp_path / FILE_NAME, metadata | {"bitplan": json.dumps(content)})
    for name in ("plan.json", "config.json"):
        (tmp_path / name).write_text((folder / name).read_text())
    with pytest.raises(ValueError, match=message):
        bitplan.load(tmp_path)


def test_packed_parts_that_are_not_all_rows() -> None:
    weight, fmt = torch.randn(6, 32), Format.parse("fp16")
    half = PackedTensor(fmt, (3, 32), {"weight": weight[:3].half()})
    parts = {"0[rows:0]": half, "0[rows:1]": half}
    model = nn.Sequential(nn.Linear(32, 6))
    with pytest.raises(ValueError, match="parts of '0', which has rows 0 to 5, share rows 2 to 2"):
        replace(model, parts, {}, {"0[rows:0]": ((0, 3),), "0[rows:1]": ((2, 5),)})
    with pytest.raises(ValueError, match="belong to another model"):
        replace(model, parts, {}, {"0[rows:0]": ((0, 2),), "0[rows:1]": ((2, 6),)})
    assert isinstance(model[0], nn.Linear)


def test_units_are_split_and_joined() -> None:
    linear = nn.Linear(8, 6)
    model = nn.Sequential(linear, nn.Linear(6, 4))
    first, second = find_units(model)
    parts = split_rows(first, [((0, 2), (4, 6)), ((2, 4),)])
    assert parts == find_matrices(model, {p.name: p.parts[0].rows or () for p in parts})[:2]
    assert whole_matrices([*parts, second]) == [first, second]
    renderer = Renderer(model, [*parts, second])
    rows = [0, 1, 4, 5]
    assert torch.equal(renderer.weight("0[rows:0]"), linear.weight[rows])
    with pytest.raises(ValueError, match="only a unit of one whole matrix"):
        split_rows(parts[0], [((0, 4),)])


def test_other_tools_refuse_parts(
    wide: LoadedModel, plan: Plan, folder: Path, tmp_path: Path
) -> None:
    message = (
        rf"{UP}: row_parts: it takes one format for all rows of a matrix, but the plan has 2 parts "
        r"of these rows in int4-g64, int3-g64\. Use \S+ for all rows"
    )
    for runtime in ("vllm", "llama.cpp", "onnx"):
        units = find_matrices(wide.module, plan.row_ranges)
        found = list(violations(units, assignment_formats(plan), Rules.load(runtime)))
        assert [v.unit for v in found if "row_parts" in v.reason] == [EMBED, UP, QUERY, DOWN]
    only = hand_made(
        wide, {f"{UP}[rows:{i}]": FORMATS[UP][i] for i in (0, 1)}, row_sets=ROW_SETS_OF_UP
    )
    for to, out in (("gguf", "a.gguf"), ("vllm", "b"), ("gptq", "c"), ("mlx", "d")):
        with pytest.raises(ValueError, match=message):
            export(only, to, tmp_path / out, model=wide)
        assert not (tmp_path / out).exists()
    with pytest.raises(ValueError, match="row_parts"):
        export(folder, "gguf", tmp_path / "e.gguf")


def test_rounding_up_gives_all_rows_the_widest(wide: LoadedModel, plan: Plan) -> None:
    rules = Rules.load("vllm")
    units = find_matrices(wide.module, plan.row_ranges)
    only = hand_made(
        wide, {f"{UP}[rows:{i}]": FORMATS[UP][i] for i in (0, 1)}, row_sets=ROW_SETS_OF_UP
    )
    rules_without_fusion = rules.model_copy(update={"fused": ()})
    rounded, changed = snap(units, only, assignment_formats(only), rules_without_fusion)
    fmt = rounded.assignments[UP]
    assert (rounded.assignments, rounded.row_sets) == ({UP: fmt}, {})
    assert Format.parse(fmt).bits >= 4
    assert changed == {f"{UP}[rows:{i}]": fmt for i in (0, 1)}
    assert rounded.bytes == rules.stored_bytes(Format.parse(fmt), (512, 256))
    assert len(planned_units(wide.module, rounded)) == 1


def test_plain_data_list_the_rows(wide: LoadedModel, plan: Plan, tmp_path: Path) -> None:
    export(plan, "json", tmp_path / "plan.json", model=wide)
    modules = json.loads((tmp_path / "plan.json").read_text())["modules"]
    part = modules[f"{UP}[rows:0]"]
    assert (part["matrix"], part["rows"]) == (UP, [[0, 128], [256, 320]])
    assert "matrix" not in modules["lm_head"]
    export(plan, "csv", tmp_path / "plan.csv", model=wide)
    lines = (tmp_path / "plan.csv").read_text().splitlines()
    assert lines[0].endswith(",row_ranges")
    (line,) = (line for line in lines if line.startswith(f"{UP}[rows:0],"))
    assert line.split(",")[5:] == ["192", "256", "26112", "0:128 256:320"]
