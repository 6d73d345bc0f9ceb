from __future__ import annotations

import pytest

from bitplan.search.budget import Budget, format_bytes


@pytest.mark.parametrize(
    ("text", "max_bytes"),
    [
        ("4.3bpw", 537),  # 4.3 * 1000 / 8 = 537.5, rounded down
        ("4.3 BPW", 537),
        ("2KiB", 2048),
        ("6GiB", 6 * 2**30),
        ("750MB", 750_000_000),
        ("1.5kB", 1500),
        ("123456B", 123_456),
        ("123456", 123_456),
        ("1000", 1000),
        ("5B", 5),
        ("0.3x", 600),  # of 2 bytes a weight
        ("file:82MB", 81_999_000),
        ("file:5000", 4_000),
    ],
)
def test_every_kind_resolves_to_bytes(text: str, max_bytes: int) -> None:
    assert Budget.parse(text).resolve(weights=1000, outside_bytes=1000) == max_bytes


def test_bits_per_weight_are_exact_where_binary_floats_are_not() -> None:
    # 4.35 * 80 / 8 is 43.5 exactly, but 0.1 and 0.7 have no exact binary form
    assert Budget.parse("0.7bpw").resolve(weights=80) == 7
    assert Budget.parse("0.1x").resolve(weights=15) == 3


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "Cannot read the budget ''"),
        ("four", "Cannot read the budget 'four'"),
        ("4,3bpw", "Cannot read"),
        ("4.3bwp", "'bwp' in '4.3bwp' is not a unit of a budget"),
        ("6G", "'G' in '6G' is not a unit of a budget"),
        ("file:4bpw", "'bpw' in 'file:4bpw' is not a unit of a file size"),
        ("-4.3bpw", "must be positive"),
        ("0MB", "must be positive"),
        ("0", "must be positive"),
        ("4.3", "has no unit. Did you mean '4.3bpw'"),
        ("5", "has no unit. Did you mean '5bpw' or '5GB'"),
        ("999", "has no unit"),
        ("file:82", "has no unit. Did you mean 'file:82MB'"),
    ],
)
def test_a_bad_budget_says_what_to_write(text: str, says: str) -> None:
    with pytest.raises(ValueError) as error:
        Budget.parse(text)
    assert says in str(error.value)
    assert "4.3bpw" in str(error.value)


def test_a_file_smaller_than_its_other_contents_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the rest of the file takes 9\.0 kB \(9,000 B\)"):
        Budget.parse("file:9kB").resolve(weights=1000, outside_bytes=9000)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (81_300_000, "81.3 MB"),
        (999_960, "1.0 MB"),
        (6 * 10**9, "6.0 GB"),
        (5 * 10**15, "5,000.0 TB"),
    ],
)
def test_bytes_for_people(count: int, text: str) -> None:
    assert format_bytes(count) == text
