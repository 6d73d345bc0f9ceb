"""Whether what was written runs, before it is called good."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from ..models.families import quiet
from ..models.trust import OPTION
from ..models.vocabulary import embedding_rows
from ..models.workload import Batch, LoadedModel, take

_TOKENS = 8


def check_runs(load: Callable[[], LoadedModel], original: LoadedModel) -> None:
    """Load what was written and run it on one sample of the original's inputs.

    A module without a tokenizer or batches of its own has no inputs, and is not run.

    Args:
        load: Loads what was written.
        original: The model it was made from, which says what it is run on.

    Raises:
        ValueError: If it does not load or run, takes code of its own that is not trusted, or
            gives numbers that are not finite.
    """
    batch = one_input(original)
    if batch is None:
        return
    try:
        written = load()
        workload = replace(original.workload, model=written.module)
        with torch.no_grad(), quiet():
            replace(written, workload=workload).logits(batch)
    except Exception as error:
        if OPTION in str(error):  # its code may not run here, which says nothing of the weights
            raise
        raise ValueError(
            f"What was written does not run, and was not kept ({type(error).__name__}: {error}). "
            "Where the model's code reads a weight in a way of its own, leave that layer out "
            "(--exclude)."
        ) from error


def one_input(model: LoadedModel) -> Batch | None:
    """A few tokens, or the first sample of the model's own batches; None if it has neither."""
    if model.is_language_model:
        return torch.arange(_TOKENS).remainder(embedding_rows(model) or _TOKENS)[None]
    batches = model.workload.calibration
    return take(batches[0], 0, 1) if batches else None
