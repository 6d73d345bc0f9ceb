"""The benchmark of rivals: whose bytes count, whose KL is less, what a rival is run with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from bitplan._base.progress import Reporter
from bitplan.benchmarks.bench_rivals import commands, last_line, windows
from bitplan.benchmarks.rivals_cases import CASES, LLAMA, PYTHONS, SHOWN, Case
from bitplan.benchmarks.rivals_evaluate import (
    Evaluator,
    Matrix,
    constant_bytes,
    stored_matrices,
    substituted,
)
from bitplan.benchmarks.rivals_layer import proxy_loss
from bitplan.benchmarks.rivals_table import Found, Point, at, draw, ours, table, verdict
from bitplan.models.samples import Samples, samples_from_batches
from bitplan.models.workload import LoadedModel, Workload

POINTS = [Point(2.0, 0.4, 0.004, 1.0), Point(3.0, 0.1, 0.001, 0.3)]


def llama() -> LoadedModel:
    """A random Llama of two layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    module = LlamaForCausalLM(config).eval().requires_grad_(False)
    return LoadedModel("toy", module, "float32", Workload(module))


def kept(kl: float, bpw: float) -> dict[str, Any]:
    """A row as the benchmark keeps it."""
    score = {"mean": kl, "stderr": 0.01, "same_top1": 0.5, "ppl": 20.0, "ppl_original": 10.0}
    scores = {"text": score, "code": score | {"mean": 2 * kl}}
    return {"tool": "hqq 1.0", "bytes": 1000, "bpw": bpw, "scores": scores, "seconds": 1.0}


def test_every_case_has_a_tool_an_environment_and_a_key_of_its_own() -> None:
    assert {case.tool for case in CASES} == SHOWN.keys() == PYTHONS.keys()
    assert len({case.key for case in CASES}) == len(CASES)


def test_bitplan_between_budgets_and_beyond() -> None:
    assert at(POINTS, 3.0) == pytest.approx((0.1, 0.001))
    assert at(POINTS, 2.5) == pytest.approx((0.2, 0.002))
    assert at(POINTS, 5.0) == pytest.approx((0.1, 0.001)), "never extrapolated to a lower KL"
    assert at(POINTS, 1.5) is None and at([], 3.0) is None


@pytest.mark.parametrize(
    ("kl", "stderr", "who"),
    [(0.2, 0.01, "bitplan"), (0.05, 0.01, "the rival"), (0.11, 0.01, "level")],
)
def test_who_has_less(kl: float, stderr: float, who: str) -> None:
    assert verdict(kl, stderr, (0.1, 0.001)) == who


def test_the_table_goes_by_bits_and_lists_what_did_not_run(tmp_path: Path) -> None:
    cases = [Case("hqq", "3g64"), Case("hqq", "2g64"), Case("modelopt", "3.0")]
    rows = [kept(0.2, 3.5), kept(0.9, 2.5), {"note": "not run: no memory"}]
    found = [Found.of(case, row) for case, row in zip(cases, rows, strict=True)]
    written = table(found, POINTS)
    assert [row["setting"] for row in written] == [
        "fisher_gptq",
        "2g64",
        "fisher_gptq",
        "3g64",
        "3.0",
    ]
    assert written[1]["KL / bitplan's"] == pytest.approx(0.9 / 0.2)
    assert written[1]["less KL"] == written[3]["less KL"] == "bitplan"
    assert written[-1]["KL"] is None and written[-1]["less KL"] == "not run: no memory"
    assert written[1]["bitplan's on code"] == pytest.approx(0.3**0.5)
    assert len({tuple(row) for row in written}) == 1, "all rows have the same keys"
    assert Found.of(cases[0], None).note == "not run here"
    draw(found, POINTS, tmp_path / "picture.png")
    assert (tmp_path / "picture.svg").read_text().count("HQQ") >= 1


def test_bitplans_figures_are_those_of_the_rounding_benchmark(tmp_path: Path) -> None:
    row = {"variant": "fisher_gptq", "seeds": 4, "± over seeds": 0.06, "± over text": 0.04}
    rows = [
        row | {"bpw": 3.0, "KL": 0.3, "KL on code": 0.9},
        row | {"bpw": 2.5, "KL": 0.7, "KL on code": None},
        row | {"variant": "gptq", "bpw": 2.0, "KL": 0.1, "KL on code": None},
    ]
    (tmp_path / "rounding.json").write_text(json.dumps({"rows": rows}))
    points = ours(tmp_path / "rounding.json")
    assert [point.bpw for point in points] == [2.5, 3.0]
    assert points[0].stderr == pytest.approx(0.05)


def test_constant_groups_of_gptq_do_not_count(tmp_path: Path) -> None:
    groups = torch.arange(64, dtype=torch.int32) // 32
    save_file({"a.g_idx": groups}, tmp_path / "model.safetensors")
    assert constant_bytes(tmp_path) == {"a": 256}
    save_file({"a.g_idx": groups.flip(0)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="reordered"):
        constant_bytes(tmp_path)


def test_what_a_tool_dequantized_is_read_with_its_own_bytes(tmp_path: Path) -> None:
    weight = torch.ones(2, 3)
    save_file({"model.layers.0.x": weight}, tmp_path / "dequantized.safetensors")
    (tmp_path / "bytes.json").write_text(json.dumps({"model.layers.0.x": 7}))
    (matrix,) = stored_matrices(tmp_path, llama())
    assert (matrix.name, matrix.nbytes) == ("model.layers.0.x", 7)
    assert torch.equal(matrix.weight, weight)


def test_the_evaluator_measures_the_weights_it_is_given_and_gives_the_model_back(
    tmp_path: Path,
) -> None:
    model = llama()
    ids = torch.randint(0, 64, (8, 16), generator=torch.Generator().manual_seed(0))
    text: Samples = samples_from_batches(ids.split(4), model, "text", 0)
    evaluator = Evaluator(model, {"text": text}, tmp_path, Reporter(quiet=True))
    name = "model.layers.0.mlp.up_proj"
    before = model.module.get_parameter(f"{name}.weight").clone()
    same = evaluator.matrices([Matrix(name, 1, before)], "same")["text"]
    assert same.mean == pytest.approx(0, abs=1e-6) and same.same_top1 == 1
    other = evaluator.matrices([Matrix(name, 1, -5 * before)], "other")["text"]
    with substituted(model, [Matrix(name, 1, -5 * before)]):
        changed = torch.cat([model.logits(batch) for batch in text.batches]).log_softmax(-1)
    original = torch.cat([model.logits(batch) for batch in text.batches]).log_softmax(-1)
    kl = (original.exp() * (original - changed)).sum(-1).mean()
    assert other.mean == pytest.approx(float(kl), rel=1e-4) and other.tokens == 128
    top = (original.argmax(-1) == changed.argmax(-1)).float().mean()
    assert other.same_top1 == pytest.approx(float(top)) and other.same_top1 < 1
    assert torch.equal(model.module.get_parameter(f"{name}.weight"), before)


def test_a_matrix_of_another_shape_is_refused_and_nothing_stays_changed() -> None:
    model = llama()
    name = "model.layers.0.mlp.up_proj"
    before = model.module.get_parameter(f"{name}.weight").clone()
    wrong = [Matrix(name, 1, 2 * before), Matrix(name.replace("up", "down"), 1, torch.ones(1, 1))]
    with pytest.raises(ValueError, match="down_proj"), substituted(model, wrong):
        pass
    assert torch.equal(model.module.get_parameter(f"{name}.weight"), before)


def test_llama_cpp_gets_its_importance_matrix_once(tmp_path: Path) -> None:
    case = Case(LLAMA, "Q2_K", {"type": "Q2_K"})
    words = commands(case, Path("bin"), tmp_path, tmp_path / "out.gguf")
    assert [Path(line[0]).name for line in words] == ["llama-imatrix", *2 * ["llama-quantize"]]
    (tmp_path / "imatrix.gguf").touch()
    words = commands(case, Path("bin"), tmp_path, tmp_path / "out.gguf")
    assert len(words) == 2 and tmp_path / "imatrix.gguf" in words[0]


def test_windows_spread_over_the_text_and_need_enough_of_it() -> None:
    starts = windows(1000, 5, 100)
    assert starts[0] == 0 and starts[-1] + 100 <= 1000 and len(starts) == 5
    with pytest.raises(ValueError, match="too few"):
        windows(400, 5, 100)


def test_the_reason_of_a_failure_names_no_path() -> None:
    assert last_line("a\nOSError: /home/me/x.bin is missing\n") == "OSError: x.bin is missing"
    assert last_line("") == "no message"


def test_the_proxy_loss_weighs_errors_by_the_inputs() -> None:
    hessian = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    assert proxy_loss(torch.tensor([[1.0, -1.0]]), hessian) == pytest.approx(2.0)
    assert proxy_loss(torch.tensor([[1.0, 1.0]]), hessian) == pytest.approx(6.0)
