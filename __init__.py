"""bitplan: decides how many bits each part of a neural network gets."""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# Public name -> submodule. Resolved on first use (PEP 562), so that importing the root
# package never imports torch, triton or transformers.
_EXPORTS = {
    "Budget": ".search.budget",
    "Format": ".quantizers.format",
    "Frontier": ".search.frontier",
    "Plan": ".search.plan",
    "SensitivityTable": ".sensitivity.table",
    "apply": ".jobs.materialize",
    "load": ".jobs.materialize",
    "Workload": ".models.workload",
    "profile": ".sensitivity.estimate",
    "quantize": ".jobs.materialize",
    "solve": ".search.solve",
    "trusting": ".models.trust",
}
__all__ = [
    "Budget",
    "Format",
    "Frontier",
    "Plan",
    "SensitivityTable",
    "Workload",
    "__version__",
    "apply",
    "load",
    "profile",
    "quantize",
    "solve",
    "trusting",
]

if TYPE_CHECKING:
    from .jobs.materialize import apply as apply
    from .jobs.materialize import load as load
    from .jobs.materialize import quantize as quantize
    from .models.trust import trusting as trusting
    from .models.workload import Workload as Workload
    from .quantizers.format import Format as Format
    from .search.budget import Budget as Budget
    from .search.frontier import Frontier as Frontier
    from .search.plan import Plan as Plan
    from .search.solve import solve as solve
    from .sensitivity.estimate import profile as profile
    from .sensitivity.table import SensitivityTable as SensitivityTable


def __getattr__(name: str) -> object:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
