"""Prices and figures that a run folder keeps: reused, recomputed when damaged, never mixed up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bitplan._base.progress import Reporter
from bitplan.jobs.folder import RunFolder
from bitplan.jobs.settings import ProfileSettings
from bitplan.jobs.truth import Truth, guarded
from bitplan.models.find import find_units
from bitplan.models.rendering import Renderer
from bitplan.models.samples import Samples, calibration_samples, samples_from_batches
from bitplan.models.workload import LoadedModel, Workload
from bitplan.quantizers.format import Format
from bitplan.sensitivity.linearize import linearize
from bitplan.sensitivity.provenance import ModelRef, Provenance
from bitplan.sensitivity.shrinkage import Shrinkage
from bitplan.sensitivity.table import SensitivityTable, stored_bytes

FORMATS = ("int2-gc-asym", "int4-gc-asym", "fp32")
CHOICE = np.array([1, 0])


class Net(nn.Module):
    """Two layers that count how often they are run."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 5)
        self.runs = 0
        self.broken = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.broken:
            raise AssertionError("the model must not run")
        self.runs += 1
        result: torch.Tensor = self.down(torch.tanh(self.up(x)))
        return result


def loaded() -> LoadedModel:
    torch.manual_seed(0)
    module = Net().requires_grad_(False).eval()
    return LoadedModel("net", module, "float32", Workload(module))


def samples(model: LoadedModel, seed: int, batches: int = 3) -> Samples:
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(8, 8, generator=generator) for _ in range(batches)]
    return samples_from_batches(inputs, model, "net", seed)


def table(model: LoadedModel, formats: tuple[str, ...] = FORMATS) -> SensitivityTable:
    units = find_units(model.module)
    parsed = [Format.parse(name) for name in formats]
    shape = (len(units), len(formats))
    provenance = Provenance(model=ModelRef(id="net", sha256="ab12"), rounding="rtn")
    return SensitivityTable(
        units=units,
        formats=formats,
        bytes=stored_bytes(units, parsed),
        kl=np.zeros(shape),
        stderr=np.zeros(shape),
        provenance=provenance,
    )


def make(run: Path, model: LoadedModel | None = None, **changed: Any) -> Truth:
    model = model or loaded()
    arguments: dict[str, Any] = {
        "renderer": Renderer(model.module, find_units(model.module)),
        "table": table(model),
        "samples": samples(model, 1),
        "guard": samples(model, 2),
        "seed": 0,
    } | changed
    return Truth(model=model, run=RunFolder(run), reporter=Reporter(quiet=True), **arguments)


def stored(run: Path) -> list[Path]:
    return sorted(run.glob("local-*.safetensors"))


def test_prices_are_those_of_the_linearization(tmp_path: Path) -> None:
    model = loaded()
    units = find_units(model.module)
    found = make(tmp_path).linearize(CHOICE, 1)
    expected = linearize(
        model,
        Renderer(model.module, units),
        units,
        [Format.parse(name) for name in FORMATS],
        CHOICE,
        samples(model, 1),
        0,
    )
    np.testing.assert_array_equal(found.first, expected.first)
    kinds = [unit.kind for unit in units]
    shrunk = Shrinkage(expected.second, expected.diagonal, kinds).prices()
    np.testing.assert_array_equal(found.second, shrunk)
    for array in (found.first[:, np.arange(2), CHOICE], found.second[np.arange(2), CHOICE]):
        assert not array.any(), "a unit that keeps its format changes nothing"


def test_stored_prices_are_read_without_running_the_model(tmp_path: Path) -> None:
    first = make(tmp_path).linearize(CHOICE, 1)
    model = loaded()
    again = make(tmp_path, model)
    model.module.broken = True  # type: ignore[assignment]
    second = again.linearize(CHOICE, 7)
    np.testing.assert_array_equal(first.first, second.first)
    np.testing.assert_array_equal(first.second, second.second)
    assert second.first.dtype == np.float32 and second.second.dtype == np.float64
    with pytest.raises(AssertionError, match="must not run"):
        again.linearize(1 - CHOICE, 1)


@pytest.mark.parametrize("damage", [b"", b"{", None])
def test_a_damaged_file_is_computed_again(tmp_path: Path, damage: bytes | None) -> None:
    first = make(tmp_path).linearize(CHOICE, 1)
    (path,) = stored(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    second = make(tmp_path).linearize(CHOICE, 1)
    np.testing.assert_array_equal(first.first, second.first)
    np.testing.assert_array_equal(first.second, second.second)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("changed", ["samples", "fewer", "seed", "formats", "model"])
def test_what_prices_depend_on_names_another_file(tmp_path: Path, changed: str) -> None:
    make(tmp_path).linearize(CHOICE, 1)
    model = loaded()
    base = table(model)
    other = {"model": ModelRef(id="net", sha256="c")}
    renamed = base.provenance.model_copy(update=other)
    others: dict[str, dict[str, Any]] = {
        "samples": {"samples": samples(model, 5)},
        "fewer": {"samples": samples(model, 1).head(8)},
        "seed": {"seed": 1},
        "formats": {"table": table(model, ("int3-gc-asym", *FORMATS[1:]))},
        "model": {"table": replace(base, provenance=renamed)},
    }
    make(tmp_path, model, **others[changed]).linearize(CHOICE, 1)
    assert len(stored(tmp_path)) == 2


def test_another_guard_does_not_change_prices(tmp_path: Path) -> None:
    make(tmp_path).linearize(CHOICE, 1)
    model = loaded()
    model.module.broken = True  # type: ignore[assignment]
    make(tmp_path, model, guard=samples(model, 9)).linearize(CHOICE, 1)
    assert len(stored(tmp_path)) == 1


def true_kl(model: LoadedModel, choice: np.ndarray, inputs: Samples) -> np.ndarray:
    units = find_units(model.module)
    renderer = Renderer(model.module, units)
    assignment = {
        name: Format.parse(FORMATS[f])
        for unit, f in zip(units, choice, strict=True)
        for name in unit.modules
    }
    x = torch.cat(list(inputs.batches))  # type: ignore[arg-type]
    with torch.no_grad():
        log_p = model.module(x).log_softmax(-1)
        with renderer.applied(assignment):
            log_q = model.module(x).log_softmax(-1)
    kl: np.ndarray = (log_p.exp() * (log_p - log_q)).sum(-1).double().numpy()
    return kl


def test_the_oracle_measures_the_guard_and_remembers_it(tmp_path: Path) -> None:
    model = loaded()
    truth = make(tmp_path, model)
    found = truth.oracle(max_tokens=10**6).kl([CHOICE, 1 - CHOICE], range(24))
    for row, choice in zip(found, (CHOICE, 1 - CHOICE), strict=True):
        np.testing.assert_allclose(row, true_kl(model, choice, samples(model, 2)), atol=1e-6)
    again = truth.oracle(max_tokens=10**6)
    runs = model.module.runs
    np.testing.assert_array_equal(again.kl([1 - CHOICE, CHOICE], range(24)), found[::-1])
    assert model.module.runs == runs
    other = make(tmp_path, loaded(), guard=samples(model, 3)).oracle(10**6)
    assert (other.kl([CHOICE], range(24)) != found[:1]).any()
    assert len(list(tmp_path.glob("oracle-*.jsonl"))) == 2


def test_the_guard_of_a_language_model_is_other_text_of_the_same_order(tiny: LoadedModel) -> None:
    texts = "prose:0.5,code:0.3,chat:0.2"
    inside = calibration_samples(tiny, texts, sequences=12, length=16, seed=3)
    longer = calibration_samples(tiny, texts, sequences=30, length=16, seed=3)
    rows = torch.cat(list(longer.batches))  # type: ignore[arg-type]
    for rounding, before in (("rtn", 12), ("fisher_gptq", 22)):  # which looks at 10 more
        settings = ProfileSettings(
            "tiny",
            rounding=rounding,
            rounding_sequences=10,
            calibration=texts,
            sequences=12,
            length=16,
            seed=3,
        )
        priced, apart = guarded(tiny, settings, inside, 8)
        assert priced is inside
        found = torch.cat(list(apart.batches))  # type: ignore[arg-type]
        assert torch.equal(found, rows[before : before + 8])


def test_the_guard_of_a_workload_is_the_last_quarter_of_its_batches() -> None:
    model = loaded()
    whole = samples(model, 0, batches=8)
    priced, apart = guarded(model, ProfileSettings("net"), whole, 64)
    assert (priced.count, apart.count) == (48, 16)
    both = [*priced.batches, *apart.batches]
    assert all(a is b for a, b in zip(both, whole.batches, strict=True))


def test_too_few_samples_to_keep_some_apart() -> None:
    model = loaded()
    with pytest.raises(ValueError, match="8 calibration samples are too few"):
        guarded(model, ProfileSettings("net"), samples(model, 0, batches=1), 64)
