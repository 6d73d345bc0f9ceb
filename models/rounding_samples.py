"""Rounding sequences: what a rounding method sees of the data, which no price comes from.

Weights rounded with an eye on some sequences fit these better than others, so that prices from the
same sequences come out too low.
"""

from __future__ import annotations

from .._base.progress import Reporter
from .names import BUILTIN
from .samples import Samples, calibration_samples
from .workload import LoadedModel

SEQUENCES = 128  # by default


def rounding_samples(
    model: LoadedModel,
    source: str = BUILTIN,
    sequences: int = SEQUENCES,
    length: int = 128,
    seed: int = 0,
    *,
    priced: int,
) -> Samples:
    """The sequences of a text that follow those that prices come from, in the seed's order.

    Args:
        model: A language model.
        source: The calibration text; see :func:`.samples.calibration_samples`.
        sequences: How many.
        length: Tokens per sequence.
        seed: That of the calibration.
        priced: Sequences that prices come from.

    Raises:
        ValueError: If the text is missing, or has too few sequences for both.
    """
    try:
        return calibration_samples(model, source, sequences, length, seed, skip=priced)
    except ValueError as error:
        calibration_samples(model, source, priced, length, seed)  # if that fails, it says why
        raise ValueError(
            f"{error} {priced} of them are for prices (--sequences) and {sequences} others for "
            "rounding: a lower --rounding-sequences leaves more for prices."
        ) from error


def in_halves(samples: Samples, reporter: Reporter | None = None) -> tuple[Samples, Samples]:
    """Batches to price on and batches to round by: the second half of some, and the first.

    A single batch is both, which is said.
    """
    middle = len(samples.batches) // 2
    if not middle:
        if reporter is not None:
            reporter.say(
                "Prices and rounding share the only batch, so prices are too low; give two batches "
                "or more"
            )
        return samples, samples
    first, second = samples.batches[:middle], samples.batches[middle:]
    return samples.of_batches(second), samples.of_batches(first)
