"""Scale tuning: exact slopes, a lower KL from the same codes, and checks that keep the best."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bitplan.jobs.folder import RunFolder
from bitplan.jobs.tuning import PATIENCE, Kept, Tuned, measure_on, tune
from bitplan.models.rendering import Renderer
from bitplan.quantizers.blocks import unpack_blocks
from bitplan.quantizers.format import FAMILIES, Format, family
from bitplan.quantizers.methods import METHODS, Evidence
from bitplan.quantizers.packed import PackedTensor
from bitplan.quantizers.scales import log_slopes, rescaled, scales_of
from bitplan.sensitivity.metrics import Task
from bitplan.sensitivity.tuning import RATES, Tuner
from bitplan.testing.toys import toy_task

KINDS = ("int2-g32-asym", "int3-gc", "int3-gt", "nf4-g32", "q4_1", "q3_k", "q2_k", "iq4_xs")
EXAMPLES = [name for kind in FAMILIES.names() for name in family(kind).examples]
Rest = dict[str, list[Tensor]]


@pytest.fixture
def task() -> Task:
    """Four units: an embedding tied to the head, a convolution in two groups, and two layers."""
    return toy_task()


def made(task: Task, spec: str, steps: int = 8, seed: int = 0) -> Tuner:
    assignment = {unit.name: Format.parse(spec) for unit in task.units}
    return Tuner(task.model, task.renderer, assignment, task.samples, steps=steps, seed=seed)


def packs(tuner: Tuner) -> dict[str, PackedTensor]:
    return {name: tuner.renderer.store.packed(name, fmt) for name, fmt in tuner._assignment.items()}


def kl(task: Task, tuner: Tuner, renderer: Renderer | None = None) -> float:
    """Mean KL of all samples in float64, by the plain formula."""
    total, positions = 0.0, 0
    with torch.no_grad():
        for batch in task.samples.batches:
            p = task.model.logits(batch).double().log_softmax(-1)
            with (renderer or tuner.renderer).applied(tuner._assignment):
                q = task.model.logits(batch).double().log_softmax(-1)
            total += float((p.exp() * (p - q)).sum())
            positions += p.shape[0] * p.shape[1]
    return total / positions


def without_scales(packed: PackedTensor) -> list[Tensor]:
    """Codes, zero points, integer scales and corrections: all that tuning must leave alone."""
    if packed.fmt.family == "blocks":
        codes, _, _, *rest = unpack_blocks(packed.fmt.name, packed.tensors["blocks"])
        return [codes, *(part for part in rest if part is not None)]
    return [part for name, part in sorted(packed.tensors.items()) if name != "scale"]


@pytest.mark.parametrize("spec", [*KINDS, "int3-g32+lr2"])
def test_slopes_are_those_of_the_kl(task: Task, spec: str) -> None:
    tuner = made(task, spec)
    slopes = tuner.slopes(task.samples.batches)
    start = packs(tuner)
    assert slopes.keys() == tuner.scales().keys()
    assert {key.partition(".")[0] for key in slopes} == {unit.name for unit in task.units}
    for key, slope in slopes.items():
        name, _, field = key.rpartition(".")
        packed, at = start[name], divmod(int(slope.abs().argmax()), slope.shape[1])
        found = []
        for factor in (1 + 2**-6, 1 - 2**-6):
            scales = {f: part.clone() for f, part in scales_of(packed).items()}
            before = float(scales[field][at])
            scales[field][at] *= factor
            tuner.renderer.store.put(name, packed.fmt, rescaled(packed, scales))
            found.append((kl(task, tuner), math.log(float(scales[field][at]) / before)))
        tuner.renderer.store.put(name, packed.fmt, packed)
        (up, right), (down, left) = found
        assert float(slope[at]) == pytest.approx((up - down) / (right - left), rel=0.04), key


def test_slopes_come_in_pieces(task: Task) -> None:
    """Some rows at a time, as for a lookup table, give the same as all at once."""
    for spec in (*KINDS, "int3-g32+lr2"):
        fmt = Format.parse(spec)
        weight, gradient = torch.randn(6, 300), torch.randn(6, 300)
        packed = METHODS.get("rtn")(weight, fmt, Evidence())
        grid = packed.grid()
        assert grid is not None
        whole = log_slopes(packed, grid, gradient)
        for rows in (torch.tensor([0, 2, 5]), slice(1, 3)):
            some = log_slopes(packed, grid, gradient[rows], rows)
            for field, part in whole.items():
                assert part.shape == scales_of(packed)[field].shape
                if fmt.group_size != -1:
                    torch.testing.assert_close(some[field], part[rows], rtol=1e-4, atol=1e-5)
        assert float(whole["scale"].sum() + whole.get("zero", torch.zeros(1)).sum()) == (
            pytest.approx(float((gradient * packed.coded().dequantize()).sum()), rel=1e-3)
        )


@pytest.mark.parametrize("spec", KINDS)
def test_the_kl_falls_and_the_codes_stay(task: Task, spec: str) -> None:
    tuner = made(task, spec)
    before, start = kl(task, tuner), packs(tuner)
    assert before == pytest.approx(kl(task, tuner, task.renderer), rel=1e-9)
    for _ in range(8):
        tuner.step()
    after = kl(task, tuner)
    assert after < before * 0.99
    assert kl(task, tuner, task.renderer) == pytest.approx(before, rel=1e-9), "as it was"
    for name, packed in packs(tuner).items():
        assert packed.nbytes == start[name].nbytes
        assert packed.tensors.keys() == start[name].tensors.keys()
        pairs = zip(without_scales(packed), without_scales(start[name]), strict=True)
        assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
        scales, earlier = scales_of(packed)["scale"], scales_of(start[name])["scale"]
        assert scales.dtype == torch.float16
        assert not torch.equal(scales, earlier)
        assert torch.equal(scales.sign(), earlier.sign())


class Along:
    """A tuner whose KL along any direction is a parabola with its minimum at a given length."""

    def __init__(self, tuner: Tuner, best: float) -> None:
        self.tuner, self.best = tuner, best
        self.start = {key: part.clone() for key, part in tuner.state().items()}

    def slopes(self, _batches: object) -> dict[str, Tensor]:
        found = {}
        for key, part in self.tuner.state().items():
            name, _, field = key.rpartition(".")
            if field == "value":
                moved = (part / self.start[key]).log().nan_to_num()
                found[name] = moved - self.best * sign_of(part)
        return found


def sign_of(part: Tensor) -> Tensor:
    """Half of the scales are to grow, half to shrink."""
    return 1 - 2 * (torch.arange(part.numel()) % 2).view(part.shape).float()


@pytest.mark.parametrize("best", [3e-4, 1e-3, 1.5e-3])
def test_the_rate_is_the_length_of_the_best_step(
    task: Task, best: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuner = made(task, "int4-g32-asym")
    before = {key: part.clone() for key, part in tuner.state().items()}
    monkeypatch.setattr(tuner, "slopes", Along(tuner, best).slopes)
    assert tuner.try_out() == tuner.rate == pytest.approx(best, rel=1e-3)
    assert all(torch.equal(part, before[key]) for key, part in tuner.state().items())


def test_the_rate_has_bounds(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    for best, rate in ((1e-6, min(RATES)), (0.5, max(RATES))):
        tuner = made(task, "int4-g32-asym")
        monkeypatch.setattr(tuner, "slopes", Along(tuner, best).slopes)
        assert tuner.try_out() == rate


def test_the_same_seed_gives_the_same_scales(task: Task) -> None:
    def after(seed: int) -> dict[str, Tensor]:
        tuner = made(toy_task(samples=64), "int2-g32-asym", seed=seed)
        assert tuner.tokens < 64 * 12, "a step must not see all samples"
        for _ in range(3):
            tuner.step()
        return tuner.scales()

    first, again, other = after(0), after(0), after(1)
    assert all(torch.equal(again[key], part) for key, part in first.items())
    assert not all(torch.equal(other[key], part) for key, part in first.items())


def test_formats_without_scales_are_left_alone(task: Task) -> None:
    for spec in ("bf16", "mxfp4"):
        assert made(task, spec).count == 0
    names = [unit.name for unit in task.units]
    specs = ("int2-g32", "bf16", "mxfp4", "q4_k")
    mixed = dict(zip(names, map(Format.parse, specs), strict=True))
    tuner = Tuner(task.model, task.renderer, mixed, task.samples, steps=2)
    tuner.step()
    assert tuner.scales().keys() == {
        f"{names[0]}.scale",
        f"{names[3]}.scale",
        f"{names[3]}.zero",
    }


@pytest.mark.parametrize("spec", EXAMPLES)
def test_every_family_takes_other_scales(spec: str) -> None:
    weight = torch.randn(5, 270, generator=torch.Generator().manual_seed(0))
    packed = METHODS.get("rtn")(weight, Format.parse(spec), Evidence())
    scales = scales_of(packed)
    assert all(
        torch.equal(part, packed.tensors[name])
        for name, part in rescaled(packed, scales).tensors.items()
    )
    if not scales:
        return
    doubled = rescaled(packed, {field: 2 * part for field, part in scales.items()})
    torch.testing.assert_close(
        doubled.coded().dequantize(), 2 * packed.coded().dequantize(), rtol=1e-6, atol=0
    )
    assert all(map(torch.equal, without_scales(doubled), without_scales(packed)))
    with pytest.raises(ValueError, match=r"has no 'scale' of the shape \[1, 77\]"):
        rescaled(packed, {"scale": torch.zeros(1, 77)})


# How a tuning goes on, and ends.

Measured = Callable[[Renderer], np.ndarray]


def kept(task: Task, run: Path, spec: str = "int2-g32-asym") -> Kept:
    assignment = {unit.name: Format.parse(spec) for unit in task.units}
    return Kept(RunFolder(run), "key", assignment)


def measure(task: Task, spec: str = "int2-g32-asym") -> Measured:
    assignment = {unit.name: Format.parse(spec) for unit in task.units}
    return measure_on(task.model, task.samples, assignment, 32)


def scripted(*means: float) -> Measured:
    """Measurements that come to these means, one after the other, on eight sequences."""
    left = list(means)
    return lambda _: left.pop(0) + np.linspace(-0.001, 0.001, 8)


def test_a_tuning_that_was_killed_comes_to_the_same_scales(task: Task, tmp_path: Path) -> None:
    spec, steps = "int8-g32-asym", list[int]()
    measured, calls = measure(task, spec), 0
    whole = tune(made(task, spec, 24), measured, 24, kept(task, tmp_path / "whole", spec))
    assert min(RATES) < whole.rate < max(RATES), "the rate is one that was found"

    def dying(renderer: Renderer) -> np.ndarray:
        nonlocal calls
        calls += 1
        if calls == 3:  # the plan before, then after 8 and after 16 steps
            raise KeyboardInterrupt
        return measured(renderer)

    part = kept(task, tmp_path / "part", spec)
    with pytest.raises(KeyboardInterrupt):
        tune(made(task, spec, 24), dying, 24, part)
    assert part.finished() is None
    tuner = made(task, spec, 24)
    again = tune(tuner, measured, 24, part, advance=steps.append)
    assert steps == [8, *[1] * 16]
    assert again == whole
    assert again.sha256 is not None and [check.step for check in again.checks] == [8, 16, 24]
    assert part.finished() == again
    assert sorted(path.name for path in (tmp_path / "part" / "tuned").iterdir()) == sorted(
        (f"{again.sha256[:16]}.safetensors", "key.json")
    )


def test_a_damaged_state_is_started_again(task: Task, tmp_path: Path) -> None:
    place = kept(task, tmp_path)
    path = place.run.tuning_state("key")
    path.parent.mkdir()
    path.write_bytes(b"no safetensors")
    assert tune(made(task, "int2-g32-asym"), measure(task), 8, place).helps
    place.run.tuning("key").write_text("{")
    assert place.finished() is None


def test_the_best_scales_are_kept(task: Task, tmp_path: Path) -> None:
    """The check after 16 steps is the best one; two in a row are no better, so it stops."""
    place, seen = kept(task, tmp_path), dict[int, Mapping[str, Tensor]]()
    tuner = made(task, "int2-g32-asym", 64)
    found = tune(
        tuner,
        scripted(0.5, 0.4, 0.3, 0.35, 0.31, 0.0),
        64,
        place,
        report=lambda check: seen.update({check.step: tuner.scales()}),
    )
    assert [check.step for check in found.checks] == [8, 16, 24, 32]
    assert len(found.checks) == 2 + PATIENCE
    assert found.best is not None and found.helps
    assert found.best.step == 16
    assert found.kl_before == pytest.approx(0.5)
    assert found.best.difference == pytest.approx(-0.2)
    assert found.sha256 is not None
    from safetensors.torch import load_file

    saved = load_file(place.run.tuned_scales(found.sha256))
    assert all(torch.equal(saved[key], part) for key, part in seen[16].items())
    assert not all(torch.equal(saved[key], part) for key, part in seen[32].items())


def test_no_clear_gain_is_none() -> None:
    def tuned(difference: float, stderr: float) -> Tuned:
        check = {"step": 8, "kl": 0.5, "difference": difference, "difference_stderr": stderr}
        return Tuned.model_validate(
            {"steps": 8, "tokens": 512, "rate": 1e-3, "kl_before": 0.6, "checks": [check]}
        )

    assert tuned(-0.02, 0.01).helps
    assert not tuned(-0.01, 0.02).helps
    assert not tuned(0.02, 0.01).helps
    assert not Tuned(steps=8, tokens=512, rate=1e-3, kl_before=0.6).helps


def test_too_few_steps_are_measured_all_the_same(task: Task, tmp_path: Path) -> None:
    found = tune(made(task, "int2-g32-asym", 1), measure(task), 1, kept(task, tmp_path))
    assert [check.step for check in found.checks] == [1]
