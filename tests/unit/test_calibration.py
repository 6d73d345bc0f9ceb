"""Calibration: disjoint, reproducible, recorded, and clear about bad input."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from bitplan.models.samples import calibration_samples, evaluation_samples
from bitplan.models.texts import builtin_prose
from bitplan.models.workload import LoadedModel, Workload


def test_the_same_seed_gives_the_same_sequences(tiny: LoadedModel) -> None:
    first = calibration_samples(tiny, sequences=5, length=16, seed=3)
    again = calibration_samples(tiny, sequences=5, length=16, seed=3)
    other = calibration_samples(tiny, sequences=5, length=16, seed=4)
    assert first.sha256 == again.sha256 != other.sha256
    assert first.count == 5
    assert first.describe()["length"] == 16


def test_batches_hold_the_asked_tokens(tiny: LoadedModel) -> None:
    samples = calibration_samples(tiny, sequences=10, length=16, batch_tokens=64)
    assert [tuple(b.shape) for b in samples.batches] == [(4, 16), (4, 16), (2, 16)]  # type: ignore[union-attr]
    assert samples.head(5).count == 8


def test_the_hash_does_not_depend_on_the_batch_size(tiny: LoadedModel) -> None:
    small, large = (
        calibration_samples(tiny, sequences=6, length=16, batch_tokens=n) for n in (16, 96)
    )
    assert small.sha256 == large.sha256


def test_sequences_longer_than_the_model_reads(tiny: LoadedModel) -> None:
    with pytest.raises(ValueError, match="at most 256 tokens; --length 300 is too long"):
        calibration_samples(tiny, sequences=1, length=300)


def test_builtin_calibration_and_evaluation_are_disjoint() -> None:
    kept, held_out = builtin_prose("calibration"), builtin_prose("evaluation")
    assert len(held_out) > 50_000
    seen = {" ".join(p.split()) for p in kept.split("\n\n")}
    assert not [p for p in held_out.split("\n\n") if " ".join(p.split()) in seen]


def test_evaluation_reads_in_order(tiny: LoadedModel, tmp_path: Path) -> None:
    text = "one two three four five six seven eight nine ten " * 20
    (tmp_path / "text").write_text(text)
    samples = evaluation_samples(tiny, str(tmp_path / "text"), tokens=64, length=16)
    ids = torch.cat(list(samples.batches)).flatten()  # type: ignore[arg-type]
    assert len(ids) == 64
    assert text.startswith(tiny.workload.tokenizer.decode(ids)[:40])


def test_self_sampling_needs_no_text_and_repeats(tiny: LoadedModel) -> None:
    first = calibration_samples(tiny, "self", sequences=3, length=12, seed=1)
    assert first.sha256 == calibration_samples(tiny, "self", 3, 12, seed=1).sha256
    assert first.batches[0].shape == (3, 12)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No text file at"), ("", "is empty"), ("too short", r"holds 0 sequences of 32 tokens")],
)
def test_bad_texts_are_explained(
    tiny: LoadedModel, tmp_path: Path, content: str | None, message: str
) -> None:
    path = tmp_path / "text"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message):
        calibration_samples(tiny, str(path), sequences=4, length=32)


def test_a_workload_without_evaluation_batches_holds_some_out() -> None:
    module = nn.Linear(3, 2)
    batches = [torch.randn(2, 3) for _ in range(5)]
    model = LoadedModel("toy", module, "float32", Workload(module, calibration=batches))
    assert calibration_samples(model).count == 8
    torch.testing.assert_close(evaluation_samples(model).batches[0], batches[4])
    with pytest.raises(ValueError, match=r"brings its own batches.*cannot use 'a.txt'.*--calib"):
        calibration_samples(model, "a.txt")
    with pytest.raises(ValueError, match=r"brings its own batches.*cannot use 'a.txt'.*--eval"):
        evaluation_samples(model, "a.txt")
    lonely = LoadedModel("toy", module, "float32", Workload(module, calibration=batches[:1]))
    with pytest.raises(ValueError, match="at least two batches"):
        calibration_samples(lonely)


@pytest.mark.parametrize("seed", [0, 3])
def test_skipped_sequences_are_those_another_call_takes(tiny: LoadedModel, seed: int) -> None:
    def rows(count: int, skip: int, batch_tokens: int = 64) -> torch.Tensor:
        found = calibration_samples(
            tiny, sequences=count, length=16, seed=seed, batch_tokens=batch_tokens, skip=skip
        )
        return torch.cat(list(found.batches))  # type: ignore[arg-type]

    whole = rows(20, 0)
    assert torch.equal(rows(8, 0), whole[:8])
    assert torch.equal(rows(12, 8, batch_tokens=16), whole[8:])
    assert len(whole.unique(dim=0)) == 20, "windows do not overlap"


def test_skipping_needs_a_text_that_is_long_enough(tiny: LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("one two three four five six seven eight nine ten " * 20)
    held = 1
    while True:
        try:
            calibration_samples(tiny, str(path), sequences=held + 1, length=32)
        except ValueError:
            break
        held += 1
    assert calibration_samples(tiny, str(path), sequences=1, length=32, skip=held - 1).count == 1
    with pytest.raises(ValueError, match=f"holds {held} sequences .* {held + 1} are needed"):
        calibration_samples(tiny, str(path), sequences=1, length=32, skip=held)


def test_self_sampled_sequences_after_others_are_new_ones(tiny: LoadedModel) -> None:
    first, later, again = (
        calibration_samples(tiny, "self", sequences=4, length=12, seed=1, skip=skip).batches[0]
        for skip in (0, 4, 4)
    )
    assert torch.equal(later, again)  # type: ignore[arg-type]
    both = torch.cat([first, later])  # type: ignore[list-item]
    assert len(both.unique(dim=0)) == 8


@pytest.mark.parametrize(
    ("count", "kept"),
    [(1, [2]), (2, [2]), (3, [2]), (5, [2]), (6, [4, 2]), (9, [4, 2]), (99, [4, 4, 2])],
)
def test_the_tail_is_whole_batches_from_the_end(
    tiny: LoadedModel, count: int, kept: list[int]
) -> None:
    samples = calibration_samples(tiny, sequences=10, length=16, batch_tokens=64)
    tail = samples.tail(count)
    assert [len(batch) for batch in tail.batches] == kept
    for ours, theirs in zip(reversed(tail.batches), reversed(samples.batches), strict=False):
        assert ours is theirs
    if tail.count < 10:
        head = samples.head(10 - tail.count)
        assert [*map(id, head.batches), *map(id, tail.batches)] == [*map(id, samples.batches)]
