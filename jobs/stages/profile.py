"""What every unit costs in every format."""

from __future__ import annotations

from ..context import Context, Stage
from ..prepare import profiled


def profile(context: Context) -> None:
    """Profile the model, or take the finished profile that is there.

    Raises:
        ValueError: If the folder holds a profile made with other settings.
    """
    table = profiled(context.work, context.folder, context.reporter)
    context.table = context.goal.limits.for_runtime(table)


STAGE = Stage("profile", profile)
