"""Plans as the first schema wrote them, whose facts were in their words."""

from __future__ import annotations

from typing import Any

from .budget import Budget

_UNIFORM = "uniform "  # began the name of a baseline that had one format
_OF_MEMORY = " of memory"  # ended the text of a budget that was a memory
_FASTEST = ", fastest"  # ended the text of a target that asked for time


def upgraded(data: dict[str, Any]) -> dict[str, Any]:
    """A plan of schema 1 as schema 2 has it: the same figures, and as data what names said.

    What a plan of schema 1 does not know stays unknown: the size of the whole model, and how much
    of it is planned.
    """
    budget = dict(data["budget"])
    text = str(budget["text"])
    goal = "budget"
    if text.endswith(_OF_MEMORY):
        goal, asked = "memory", Budget.parse(text.removesuffix(_OF_MEMORY))
        budget |= {"kind": "memory", "memory": asked.resolve(data["weights"])}
    elif "<=" in text:
        goal = "speed" if text.endswith(_FASTEST) else "quality"
        budget |= {"kind": "target"}
    baselines = [
        {
            **baseline,
            "format": name.removeprefix(_UNIFORM) if name.startswith(_UNIFORM) else None,
        }
        for baseline in data.get("baselines", [])
        for name in [str(baseline["name"])]
    ]
    return {**data, "schema": 2, "goal": goal, "budget": budget, "baselines": baselines}
