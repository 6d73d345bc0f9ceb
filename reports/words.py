"""Numbers as people read them: values with errors, gaps, short format names."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

_MOST_DECIMALS = 4


def number(value: float) -> str:
    """Three significant digits, in scientific notation outside 1e-4 ... 1e6.

    >>> number(0.18634), number(38.52), number(30412.0), number(0.0)
    ('0.186', '38.5', '30400', '0')
    >>> number(0.00000213), number(67200000.0)
    ('2.13e-6', '6.72e+7')
    """
    if not math.isfinite(value) or value == 0 or not 1e-4 <= abs(value) < 1e6:
        return _short_exponent(f"{value:.3g}")
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    rounded = round(value, 2 - math.floor(math.log10(abs(value))))
    return f"{rounded:.{decimals}f}"


def with_error(value: float, stderr: float | None, sign: bool = False) -> str:
    """A value and its standard error, both to the first digit of the error (two if it is 1).

    Where that takes more than four decimals: three digits of the value, one of the error.

    >>> with_error(0.18634, 0.0041), with_error(0.02131, 0.00123), with_error(0.5, None)
    ('0.186 ± 0.004', '0.0213 ± 0.0012', '0.500')
    >>> with_error(0.00000213, 0.00000004), with_error(0.00213, 0.00008, sign=True)
    ('2.13e-6 ± 4e-8', '+0.00213 ± 8e-5')
    """
    rounded = f"{'+' if sign and value > 0 else ''}{number(value)}"
    if stderr is None or not math.isfinite(stderr) or stderr <= 0:
        return rounded
    leading = math.floor(math.log10(stderr))
    decimals = max(0, -leading + (stderr < 2 * 10**leading))
    if decimals > _MOST_DECIMALS:
        return f"{rounded} ± {_short_exponent(f'{stderr:.0e}')}"
    return f"{value:{'+' if sign else ''}.{decimals}f} ± {stderr:.{decimals}f}"


def _short_exponent(text: str) -> str:
    return text.replace("e-0", "e-").replace("e+0", "e+")


def plain(text: str) -> str:
    """A line of a docstring without its markup: what stands between backticks, and no roles.

    >>> plain("Like ``ilp``, see :func:`~bitplan.solve` and `max_loss`.")
    'Like ilp, see bitplan.solve and max_loss.'
    """
    return re.sub(r"(?::[a-z]+)*:`~?([^`]*)`|`+([^`]*)`+", r"\1\2", text)


def gap(fraction: float) -> str:
    """How far from the proven optimum a plan can be, from its relative gap.

    >>> gap(0.0), gap(0.00012), gap(1.0)
    ('proven optimal', 'at most 0.012 % from optimal', 'no proof of optimality')
    """
    if fraction > 0.99 or not math.isfinite(fraction):
        return "no proof of optimality"
    if fraction < 1e-9:
        return "proven optimal"
    return f"at most {100 * fraction:.2g} % from optimal"


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Labels for formats and plans: without ``-asym`` where that stays unique.

    >>> short_names(["int4-g64-asym", "int8-gc", "int8-gc-asym"])
    {'int4-g64-asym': 'int4-g64', 'int8-gc': 'int8-gc', 'int8-gc-asym': 'int8-gc-asym'}
    """
    shared = Counter(label.removesuffix("-asym") for label in set(names))
    return {
        name: short if shared[short := name.removesuffix("-asym")] == 1 else name for name in names
    }
