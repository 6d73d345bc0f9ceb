"""What a search will read, hold and compute, from the names and shapes of a model alone."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

from .._base.memory import available_memory
from ..models.checkpoint import streamed_bytes
from ..models.find import coverage, find_units
from ..models.load import WORKING, fits, load_structure
from ..models.prefix import blocks_of
from ..models.trust import allowed
from ..models.units import UnitInfo
from ..models.workload import LoadedModel
from ..quantizers.format import resolve_formats
from ..quantizers.methods import METHODS
from ..search.budget import format_bytes
from ..sensitivity.metrics import METRICS
from .prepare import check
from .settings import ProfileSettings, SearchSettings

FORWARD, BACKWARD = 2, 4  # operations per weight and token
_BY_BATCH = "for every batch"


def forecast(settings: ProfileSettings, search: SearchSettings) -> Iterator[str]:
    """Lines on a search that is not made; no weights are read.

    Raises:
        ValueError: If a name is unknown, as the search itself would say.
    """
    with allowed(settings.trust_remote_code):
        check(settings, search)
        model = load_structure(settings.model)
    units = find_units(
        model.module, settings.include, settings.exclude, settings.groups, settings.per_expert
    )
    formats = resolve_formats(settings.formats, model.source_dtype)
    weights = sum(parameter.numel() for parameter in model.module.parameters())
    inside = coverage(model.module, units, bool(settings.include or settings.exclude))
    yield f"{model.id}: {weights:,} weights, {model.source_dtype} in the checkpoint"
    yield (
        f"planned: {len(units)} units with {inside.planned:,} weights, {len(formats)} formats: "
        f"{len(units) * len(formats):,} prices"
    )
    streamed = yield from _mode(settings, weights)
    if streamed:
        yield from _held(model, settings, units)
    yield from _computed(settings, search, weights, streamed)


def _mode(settings: ProfileSettings, weights: int) -> Generator[str, None, bool]:
    """Where the weights will be; returns whether in their files."""
    room = available_memory() if settings.memory_bytes is None else settings.memory_bytes
    said = "--memory" if settings.memory else "available"
    folder = Path(settings.model)
    try:
        streamed = folder.is_dir() and not fits(folder, settings.memory_bytes)
    except ValueError:  # no safetensors
        streamed = False
    size = streamed_bytes(folder) if streamed else 4 * weights
    need = f"{format_bytes(size)} in float32 and about {format_bytes(WORKING)} to work in"
    if streamed:
        yield f"weights stay in their files: {need} do not fit {format_bytes(room)} ({said})"
    elif size + WORKING > room:
        yield f"weights are loaded whole: only folders of safetensors stay in their files; {need}"
    else:
        yield f"weights are loaded whole: {need} fit {format_bytes(room)} ({said})"
    return streamed


def _held(
    model: LoadedModel, settings: ProfileSettings, units: Sequence[UnitInfo]
) -> Iterator[str]:
    """What is in memory, and in temporary files, where the weights stay in theirs."""
    blocks = blocks_of(model.module, units)
    inside = [sum(p.numel() for p in block.parameters()) for block in blocks.values()]
    total = sum(p.numel() for p in model.module.parameters())
    yield (
        f"held at a time: a block of at most {format_bytes(4 * max(inside, default=total))} in "
        f"float32 ({len(blocks)} blocks), or what comes before and after them "
        f"({format_bytes(4 * (total - sum(inside)))})"
    )
    hidden = getattr(getattr(model.module, "config", None), "hidden_size", None)
    if isinstance(hidden, int):
        states = 4 * hidden * settings.sequences * settings.length * len(blocks)
        yield f"hidden states between blocks: {format_bytes(states)}, in a file beyond 64 MiB"


def _computed(
    settings: ProfileSettings, search: SearchSettings, weights: int, streamed: bool
) -> Iterator[str]:
    """Passes over the weights, and operations."""

    def line(what: str, tokens: int, cost: int, reads: str) -> str:
        read = f", the weights read {reads}" if streamed else ""
        return f"{what}: {tokens:,} tokens, {cost * weights * tokens / 1e12:,.1f} TFLOP{read}"

    both, again = FORWARD + BACKWARD, FORWARD if streamed else 0
    if needs := METHODS.trait(settings.rounding, "needs"):
        tokens = settings.rounding_sequences * settings.length
        how = (both + again, "2 times") if "fisher" in needs else (FORWARD, _BY_BATCH)
        yield line(f"statistics for {settings.rounding}", tokens, *how)
    profile, tokens = f"profile ({settings.metric})", settings.sequences * settings.length
    match METRICS.trait(settings.metric, "reads", "gradients"):
        case "weights":
            yield f"{profile}: no text" + (", the weights read once" if streamed else "")
        case "inputs":
            yield line(profile, tokens, FORWARD, "2 times")
        case "products":
            yield line(profile, tokens, 2 * both, _BY_BATCH)
        case _:
            yield line(profile, tokens, both + again, "2 times")
    yield line("validation, each plan", search.eval_tokens, FORWARD, "once")
    if streamed:
        yield "besides, the weights are read some times more, for checks and trials on a few tokens"
