"""What the formats of a plan would cost with weights rounded to nearest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .._base.threads import parallel_map
from ..models.rendering import Assignment, Renderer
from ..models.units import UnitInfo
from ..quantizers.store import Renderings
from .statistics import Statistics


def nearest_prices(
    renderer: Renderer, units: Sequence[UnitInfo], assignment: Assignment
) -> Mapping[str, float]:
    """Prices of units whose weights are rounded to nearest, in nats per token, by unit name.

    Weights rounded to nearest know nothing of the sequences that the curvature comes from, so this
    is an unbiased estimate, as prices by other sequences are of weights that do.

    Args:
        renderer: With the Fisher statistics of a method that rounds by them.
        units: The units.
        assignment: Their formats.

    Returns:
        Those of the units all of whose matrices have statistics; none without any.
    """
    statistics = renderer.store.evidence
    if not isinstance(statistics, Statistics):
        return {}
    nearest = Renderings(renderer.weight, "rtn")

    def price(unit: UnitInfo) -> float | None:
        costs = []
        for name in unit.modules:
            fmt = assignment[name]
            if not (renderer.store.keeps(fmt) and statistics.knows(name)):
                return None
            error = nearest.rows(name, fmt) - renderer.weight(name)
            costs.append(statistics.cost(name, error))
        return sum(costs)

    device = renderer.weight(renderer.names[0]).device
    found = zip(units, parallel_map(price, units, device), strict=True)
    return {unit.name: cost for unit, cost in found if cost is not None}
