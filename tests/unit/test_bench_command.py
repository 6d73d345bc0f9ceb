"""What `bitplan kernels bench` says below its table."""

import pytest

from bitplan._commands.kernels.bench import _note
from bitplan.kernels.lab.bench import Row


def row(m: int, speedup: float, bits: int = 4) -> Row:
    return Row(bits, m, 576, 576, 1e-3, speedup, 1000)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([row(1, 4.0), row(64, 0.82), row(64, 0.62, 1), row(64, 1.0, 32)], "0.62 to 0.82 times"),
        ([row(33, 0.9)], "weights: 0.90 times"),
        ([row(64, 1.2), row(64, 1.0, 32)], ""),
        ([row(32, 0.8)], ""),  # the fused kernel, which unpacks nothing
    ],
)
def test_the_price_of_many_vectors_is_told(rows: list[Row], says: str) -> None:
    note = _note(rows)
    assert says in note and bool(says) == bool(note)
