"""How much of a model a plan is about, and what the whole of it takes in a file."""

from __future__ import annotations

import math
import warnings

from ..models.coverage import ENOUGH, Coverage
from ..sensitivity.table import SensitivityTable
from .budget import Budget

NAMED = 3  # left-out parameters that a message names
_ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def coverage_of(table: SensitivityTable) -> Coverage | None:
    """How much of the model the table's units hold; None for a profile that does not say."""
    recorded = table.provenance.coverage
    return None if recorded is None else Coverage.from_json(recorded)


def model_sizes(table: SensitivityTable, planned: int) -> tuple[int | None, int | None]:
    """Bytes of the whole model's file with a plan, and of the original one; None if unknown.

    Args:
        table: The table, whose provenance says what lies outside its units and in which dtype the
            model came.
        planned: Bytes of the planned weights.
    """
    outside, came_in = table.provenance.outside_bytes, table.provenance.file_bytes
    if outside is None:
        return None, None
    if came_in is not None:
        return planned + outside, came_in
    item = _ITEM_BYTES.get(table.provenance.dtype or "")
    return planned + outside, None if item is None else item * table.weights + outside


def outside_bytes(table: SensitivityTable, budget: Budget) -> int:
    """Bytes of the written model file outside the units; only ``file:`` budgets need them.

    Raises:
        ValueError: If the table does not record them.
    """
    if budget.kind != "file":
        return 0
    outside = table.provenance.outside_bytes
    if outside is None:
        raise ValueError(
            f"The budget {budget.text!r} counts the whole file, but this profile does not record "
            "the bytes outside its units. Profile again, or give the budget of the units alone, "
            "such as '4.3bpw'."
        )
    return outside


def describe_coverage(found: Coverage) -> str:
    """Which share of the weights is planned, and the largest that are not, as a phrase."""
    guessed = ""
    if found.unreached:
        guessed = f"; no calibration token reached {len(found.unreached):,} experts among them"
    if found.carried:
        guessed += f"; {describe_carried(found)}"
    if not found.left_out:
        return f"all {found.weights:,} weights are planned{guessed}"
    largest = sorted(found.left_out, key=lambda entry: -entry.weights)
    named = ", ".join(f"{e.name} ({e.weights:,}: {e.reason})" for e in largest[:NAMED])
    more = f" and {len(largest) - NAMED:,} more" if len(largest) > NAMED else ""
    return (
        f"{planned_share(found)} of {found.weights:,} weights are planned{guessed}; not "
        f"{named}{more}"
    )


def describe_carried(found: Coverage) -> str:
    """What the checkpoint has and the architecture does not, as a phrase; empty if there is none.

    >>> from ..models.coverage import Left
    >>> describe_carried(Coverage(8, 8, carried=(Left("mtp.fc.weight", 4096, ""),)))
    '1 tensor that the architecture does not have (mtp.fc.weight) is carried along unchanged'
    """
    if not found.carried:
        return ""
    names = [entry.name for entry in found.carried]
    named = ", ".join(names[:NAMED]) + (" …" if len(names) > NAMED else "")
    one = len(names) == 1
    return (
        f"{len(names):,} tensor{'' if one else 's'} that the architecture does not have ({named}) "
        f"{'is' if one else 'are'} carried along unchanged"
    )


def planned_share(found: Coverage) -> str:
    """Which share of the weights is planned: ``99.9 %``; 100 % is all, not nearly all."""
    return f"{math.floor(1000 * found.share) / 10:.1f} %"


def bits_per(found: Coverage | None) -> str:
    """What a plan's bits are per: of the planned weights, where those are not nearly all."""
    most = found is None or found.share >= ENOUGH
    return "bits per weight" if most else "bits per planned weight"


def check_coverage(table: SensitivityTable, budget: Budget | None, stacklevel: int = 2) -> None:
    """Refuse a budget per weight that would be about a part of the model only, or warn.

    Where the units were chosen, by ``--include`` or ``--exclude``, that is what was asked for.

    Args:
        table: The table.
        budget: What was asked for; None where that is no size.
        stacklevel: Whose line a warning is for, as in ``warnings.warn``. It is given once for a
            line: a goal is resolved before the slow profile and after it.

    Raises:
        ValueError: If ``budget`` counts bits per weight or a ratio, and units hold less than
            ENOUGH of the weights.
    """
    found = coverage_of(table)
    if found is None or found.selected or found.share_of_used >= ENOUGH:
        return
    if budget is not None and budget.kind in ("bpw", "ratio"):
        found.require(budget.text)
    text = describe_coverage(found)
    warnings.warn(f"{text[0].upper()}{text[1:]}, and stay as they are.", stacklevel=stacklevel)
