"""What a search asks of the model: measured once, counted once, kept through a kill."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from bitplan.search.oracle import Choice, Oracle

SEQUENCES, LENGTH = 12, 5
CHOICES = [np.array(c, dtype=np.intp) for c in ([0, 1, 2], [2, 1, 0], [1, 1, 1])]


class Model:
    """KL = 100 * choice[0] + 10 * choice[1] + sequence / 100, and what was run to find it."""

    def __init__(self) -> None:
        self.ran: list[tuple[tuple[int, ...], int]] = []

    def __call__(self, choices: Sequence[Choice], sequences: range) -> NDArray[np.float64]:
        assert sequences.step == 1
        self.ran += [(tuple(c.tolist()), i) for c in choices for i in sequences]
        return expected(choices, sequences)


def expected(choices: Sequence[Choice], sequences: range) -> NDArray[np.float64]:
    level = np.array([100.0 * c[0] + 10.0 * c[1] for c in choices])
    return level[:, None] + np.array(sequences) / 100


def make(log: Path | None = None, max_tokens: int = 10**6) -> tuple[Oracle, Model]:
    model = Model()
    return Oracle(model, SEQUENCES, LENGTH, max_tokens=max_tokens, log=log), model


def test_what_is_asked_twice_is_measured_once_and_counted_once() -> None:
    oracle, model = make()
    first = oracle.kl(CHOICES[:2], range(3, 7))
    again = oracle.kl([CHOICES[1], CHOICES[0], CHOICES[1]], range(3, 7))
    np.testing.assert_array_equal(first, expected(CHOICES[:2], range(3, 7)))
    np.testing.assert_array_equal(again, first[[1, 0, 1]])
    assert len(model.ran) == len(set(model.ran)) == 2 * 4
    assert oracle.tokens == 2 * 4 * LENGTH


def test_a_choice_twice_in_one_question_is_measured_once() -> None:
    oracle, model = make()
    found = oracle.kl([CHOICES[0], CHOICES[0].copy()], range(2))
    np.testing.assert_array_equal(found[0], found[1])
    assert len(model.ran) == 2
    assert oracle.tokens == 2 * LENGTH


@pytest.mark.parametrize(
    "known", [[range(4, 6)], [range(3), range(10, 12)], [range(1, 2), range(3, 4), range(8, 11)]]
)
def test_only_the_holes_of_a_range_are_measured(known: list[range]) -> None:
    oracle, model = make()
    for part in known:
        oracle.kl(CHOICES[:1], part)
    oracle.kl(CHOICES[1:2], range(2))  # another choice has other holes
    found = oracle.kl(CHOICES, range(SEQUENCES))
    np.testing.assert_array_equal(found, expected(CHOICES, range(SEQUENCES)))
    assert len(model.ran) == len(set(model.ran)) == len(CHOICES) * SEQUENCES
    assert oracle.tokens == len(CHOICES) * SEQUENCES * LENGTH


def test_the_mean_is_over_the_sequences_asked_for() -> None:
    oracle, _ = make()
    assert oracle.mean_kl(CHOICES[0]) == pytest.approx(10 + 0.055)
    assert oracle.mean_kl(CHOICES[0], range(2, 5)) == pytest.approx(10 + 0.03)


def test_spent_counts_what_is_about_to_be_asked() -> None:
    oracle, _ = make(max_tokens=4 * LENGTH)
    oracle.kl(CHOICES[:1], range(3))
    assert not oracle.spent()
    assert not oracle.spent(LENGTH)
    assert oracle.spent(LENGTH + 1)


def questions(oracle: Oracle) -> list[int]:
    """A search's questions, and the tokens it has counted after each."""
    counted = []
    for choices, sequences in (
        (CHOICES[:2], range(4)),
        (CHOICES, range(2, 9)),
        (CHOICES, range(6)),
    ):
        found = oracle.kl(choices, sequences)
        np.testing.assert_array_equal(found, expected(choices, sequences))
        counted.append(oracle.tokens)
    return counted


def test_a_resumed_search_measures_nothing_again_and_counts_the_same(tmp_path: Path) -> None:
    log = tmp_path / "oracle.jsonl"
    oracle, model = make(log)
    counted = questions(oracle)
    resumed, again = make(log)
    assert resumed.tokens == 0
    assert questions(resumed) == counted
    assert model.ran and not again.ran


def test_a_killed_search_measures_only_what_is_missing(tmp_path: Path) -> None:
    log = tmp_path / "oracle.jsonl"
    counted = questions(make(log)[0])
    lines = log.read_text().splitlines(keepends=True)
    kept = "".join(lines[:-2])
    log.write_text(kept)
    resumed, model = make(log)
    assert questions(resumed) == counted
    assert len(model.ran) == sum(len(kl) for _, _, kl in map(json.loads, lines[-2:]))


@pytest.mark.parametrize("cut", [1, 2, 12, -1])
def test_a_last_line_that_was_cut_off_is_measured_again_and_then_known(
    tmp_path: Path, cut: int
) -> None:
    log = tmp_path / "oracle.jsonl"
    counted = questions(make(log)[0])
    lines = log.read_bytes().splitlines(keepends=True)
    half = lines[-1][: len(lines[-1]) // 2 if cut < 0 else len(lines[-1]) - cut]
    log.write_bytes(b"".join(lines[:-1]) + half)
    resumed, model = make(log)
    assert questions(resumed) == counted
    _, start, kl = json.loads(lines[-1])
    # Without its line break only, the line is whole.
    assert [i for _, i in model.ran] == ([] if cut == 1 else [*range(start, start + len(kl))])
    last, unused = make(log)  # what was appended behind the broken line is not lost with it
    assert questions(last) == counted
    assert not unused.ran


def test_choices_of_other_integer_types_are_the_same_choice() -> None:
    oracle, model = make()
    oracle.kl([CHOICES[0], CHOICES[0].astype(np.int32)], range(1))
    assert len(model.ran) == 1


def test_an_overflow_is_remembered_as_such(tmp_path: Path) -> None:
    log = tmp_path / "oracle.jsonl"

    def overflow(choices: Sequence[Choice], sequences: range) -> NDArray[np.float64]:
        return np.full((len(choices), len(sequences)), np.nan)

    Oracle(overflow, SEQUENCES, LENGTH, max_tokens=1, log=log).kl(CHOICES[:1], range(2))
    resumed, model = make(log)
    assert np.isnan(resumed.kl(CHOICES[:1], range(2))).all()
    assert not model.ran
