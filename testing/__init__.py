"""What plugins promise, as pytest classes to subclass, and small inputs to try plugins on.

A plugin of your own is tested like those that come with bitplan::

    from bitplan.testing import SolverContract


    class TestMySolver(SolverContract):
        plugins = ("my_solver",)

The classes need pytest; the toys do not.
"""

import importlib
from typing import TYPE_CHECKING

# Public name -> submodule, resolved on first use: toys of the search load no torch, toys load no
# pytest.
_EXPORTS = {
    "Contract": ".contract",
    "ExporterContract": ".exporter",
    "FamilyContract": ".family",
    "MethodContract": ".method",
    "MetricContract": ".metric",
    "SiteContract": ".site",
    "SolverContract": ".solver",
    "toy_problem": ".problems",
    "toy_of": ".toys",
    "toy_task": ".toys",
}
__all__ = [
    "Contract",
    "ExporterContract",
    "FamilyContract",
    "MethodContract",
    "MetricContract",
    "SiteContract",
    "SolverContract",
    "toy_of",
    "toy_problem",
    "toy_task",
]

if TYPE_CHECKING:
    from .contract import Contract as Contract
    from .exporter import ExporterContract as ExporterContract
    from .family import FamilyContract as FamilyContract
    from .method import MethodContract as MethodContract
    from .metric import MetricContract as MetricContract
    from .problems import toy_problem as toy_problem
    from .site import SiteContract as SiteContract
    from .solver import SolverContract as SolverContract
    from .toys import toy_of as toy_of
    from .toys import toy_task as toy_task


def __getattr__(name: str) -> object:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
