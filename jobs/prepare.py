"""A loaded model with what is asked of it, and its profile in a run folder."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np

from .._base.progress import Reporter
from ..models.cache_layers import cache_layers
from ..models.find import find_units
from ..models.gguf_names import check_gguf_names
from ..models.kv_cache import KV_BITS, kv_bytes_per_token
from ..models.load import check_model, load_model
from ..models.mixture import parse_shares
from ..models.names import BUILTIN, DEFAULT_MODEL, PROSE
from ..models.rendering import Renderer
from ..models.rounding_samples import in_halves, rounding_samples
from ..models.samples import Samples, calibration_samples, evaluation_samples
from ..models.streamed import is_streamed
from ..models.text_files import split_field
from ..models.texts import check_text
from ..models.units import UnitInfo
from ..models.workload import LoadedModel
from ..quantizers.candidates import expanded
from ..quantizers.format import Format, resolve_formats
from ..quantizers.methods import METHODS
from ..search.blackbox.storage import shown
from ..search.budget import Budget
from ..search.goals import GOALS, Asked, Goal, ModelFacts, goal_class
from ..search.kv import KVTable
from ..search.solvers import SOLVERS
from ..sensitivity.estimate import price, provenance
from ..sensitivity.evidence import calibrated
from ..sensitivity.folding import NONE, check_fold
from ..sensitivity.metrics import METRICS
from ..sensitivity.provenance import Provenance
from ..sensitivity.table import SensitivityTable, stored_bytes
from ..sensitivity.uses import idle_units, refuse_unreached
from .folder import RunFolder
from .folding import fold_model
from .settings import NO_TEXT, ProfileSettings, SearchSettings


@dataclass(frozen=True, slots=True)
class Work:
    """A loaded model, what is asked of it, and what that will be recorded as.

    Attributes:
        model: The original model.
        units: Its units.
        formats: Their candidate formats.
        samples: Calibration sequences.
        provenance: What the profile will say of itself.
        renderer: The one source of renderings of the run: what was priced is what is measured.
        seen: Further sequences that the weights are rounded by, if the method needs data.
    """

    model: LoadedModel
    units: tuple[UnitInfo, ...]
    formats: tuple[Format, ...]
    samples: Samples
    provenance: Provenance
    renderer: Renderer
    seen: Samples | None = None

    def blank_table(self) -> SensitivityTable:
        """The table with exact bytes and no prices."""
        shape = (len(self.units), len(self.formats))
        return SensitivityTable(
            units=self.units,
            formats=tuple(fmt.name for fmt in self.formats),
            bytes=stored_bytes(self.units, self.formats),
            kl=np.zeros(shape),
            stderr=np.zeros(shape),
            provenance=self.provenance,
        )


def prepare(settings: ProfileSettings, reporter: Reporter, folder: RunFolder | None = None) -> Work:
    """Load a model, find its units and choose its calibration sequences.

    Codes that cannot be recomputed are kept in the run's ``folder``, if there is one.

    Raises:
        ValueError: If a name is unknown, or the model or text cannot be used.
    """
    check(settings)
    reporter.say(f"Loading {settings.model}")
    model = load_model(settings.model, settings.device, settings.memory_bytes)
    if is_streamed(model.module):
        whole = 4 * sum(parameter.numel() for parameter in model.module.parameters())
        reporter.say(
            f"Weights stay in their files ({whole / 2**30:.2f} GiB in float32 would not fit): "
            "blocks are gone through one after the other"
        )
    units = find_units(
        model.module, settings.include, settings.exclude, settings.groups, settings.per_expert
    )
    samples, seen = _sequences(model, settings, reporter)
    _note_unused(model, settings)
    units, idle = _used(model, units, samples, reporter)
    inside = sum(unit.weights for unit in units)
    everything = sum(p.numel() for p in model.module.parameters())
    reporter.say(
        f"{len(units)} units with {inside:,} weights; the other {everything - inside:,} "
        "parameters stay as they are"
    )
    selected = bool(settings.include or settings.exclude)
    formats = resolve_formats(expanded(settings.formats), model.source_dtype)
    fold = None
    if settings.fold != NONE:
        looked_at = samples if seen is None else seen
        fold = fold_model(
            model,
            units,
            settings.fold,
            formats,
            settings.rounding,
            looked_at,
            folder,
            reporter,
        )
    origin = provenance(
        model,
        units,
        formats,
        samples,
        settings.metric,
        settings.rounding,
        settings.seed,
        selected,
        seen,
        idle,
    ).model_copy(update={"fold": fold})
    drawn = f"{samples.count:,} calibration {origin.words.drawn}"
    if model.is_language_model:
        drawn += f": each price errs by about {(2 / samples.count) ** 0.5:.0%}"
    reporter.say(drawn)
    if seen is not None:
        reporter.say(f"{seen.count:,} further {origin.words.drawn} to round by")
    renderer = calibrated(
        model,
        units,
        settings.rounding,
        seen,
        model_sha256=origin.model.sha256,
        folder=folder.renderings if folder else None,
        statistics=folder.statistics if folder else None,
        reporter=reporter,
    )
    return Work(model, units, formats, samples, origin, renderer, seen)


def _used(
    model: LoadedModel, units: tuple[UnitInfo, ...], samples: Samples, reporter: Reporter
) -> tuple[tuple[UnitInfo, ...], tuple[str, ...]]:
    """The units that the output depends on, and the weights of the others, which stay as they are.

    Raises:
        ValueError: If there is no such unit.
    """
    idle = idle_units(model, units, samples.batches)
    if len(idle) == len(units):
        refuse_unreached([unit.modules[0] for unit in idle])
    if idle:
        weights = sum(unit.weights for unit in idle)
        reporter.say(
            f"{len(idle):,} units with {weights:,} weights have no part in the output on the "
            f"calibration data and stay as they are, the first {idle[0].name}"
        )
    kept = tuple(unit for unit in units if unit not in idle)
    return kept, tuple(part.module for unit in idle for part in unit.parts)


def _sequences(
    model: LoadedModel, settings: ProfileSettings, reporter: Reporter
) -> tuple[Samples, Samples | None]:
    """What prices come from, and what weights are rounded by if the method needs data.

    Raises:
        ValueError: If the text cannot be used, or is too short for both.
    """
    samples = calibration_samples(
        model,
        settings.calibration,
        settings.sequences,
        settings.length,
        settings.seed,
        settings.batch_tokens,
    )
    if not METHODS.trait(settings.rounding, "needs"):
        return samples, None
    if not model.is_language_model:
        return in_halves(samples, reporter)
    seen = rounding_samples(
        model,
        settings.calibration,
        settings.rounding_sequences,
        settings.length,
        settings.seed,
        priced=settings.sequences,
    )
    return samples, seen


def check(settings: ProfileSettings, search: SearchSettings | None = None) -> None:
    """Find out what is plainly wrong before a run folder is made and a model is loaded.

    Raises:
        ValueError: If a name is unknown, a file is missing or a budget cannot be read.
    """
    METRICS.get(settings.metric)
    METHODS.get(settings.rounding)
    check_fold(settings.fold)
    resolve_formats(expanded(settings.formats), "float32")
    check_model(settings.model, settings.device)
    check_text(settings.calibration, "calibration")
    _ = settings.memory_bytes
    if search is not None:
        SOLVERS.get(search.solver)
        if search.sequential and not METHODS.trait(settings.rounding, "needs"):
            raise ValueError(
                f"--sequential rounds for the inputs that rounded blocks give, and "
                f"{settings.rounding!r} looks at no inputs. Leave it out, or round by another "
                "method: --rounding fisher_gptq."
            )
        check_text(search.evaluation, "evaluation")
        if search.eval_also not in (None, NO_TEXT):
            check_text(search.eval_also, "evaluation")
        for budget in (search.budget, search.vram):
            if budget is not None:
                Budget.parse(budget)
        if search.storage is not None:
            shown(search.storage)  # raises if it is no URL


def check_runtime(work: Work, runtime: str | None) -> None:
    """Find out before the slow profile whether a runtime has this architecture.

    Raises:
        ValueError: If it has not, or no place for a planned matrix.
    """
    if runtime != "llama.cpp" or work.model.id == DEFAULT_MODEL or work.model.id.endswith(".gguf"):
        return
    parts = (part for unit in work.units for part in unit.parts)
    config = getattr(work.model.module, "config", None)
    check_gguf_names(config, {part.module: part.shape for part in parts}, work.model.id)


def goal_of(search: SearchSettings, model: LoadedModel) -> Goal:
    """What is asked for, of this model.

    Raises:
        ValueError: If the model or the solver cannot do that.
    """
    asked = Asked(
        budget=search.budget,
        vram=search.vram,
        max_kl=search.max_kl,
        max_ppl=search.max_ppl,
        fastest=search.fastest,
        context=search.context,
        batch=search.batch,
        solver=search.solver,
        limits=search.limits(),
    )
    kind = goal_class(asked)
    plans_cache = GOALS.trait(kind.name, "plans_cache", False) and model.is_language_model
    cache = _unpriced_cache(model) if plans_cache else None
    return kind(asked, ModelFacts(model.id, model.is_language_model, cache))


def _unpriced_cache(model: LoadedModel) -> KVTable:
    """What the KV cache of every layer takes; prices come later.

    Caches of another kind than keys and values of every token have no narrower form here: where a
    model has such, all of its cache counts as it is, at 16 bits.

    Raises:
        ValueError: If the model has none that can be seen.
    """
    try:
        size = kv_bytes_per_token(getattr(model.module, "config", None), KV_BITS)
    except ValueError:
        found = cache_layers(model)
        zero = np.zeros((len(found), 1))
        return KVTable(
            tuple(layer.name for layer in found),
            (16,),
            np.array([[layer.per_token] for layer in found], dtype=np.int64),
            zero,
            zero,
            windows=tuple(layer.window or 0 for layer in found),
            constants=tuple(layer.constant for layer in found),
        )
    zero = np.zeros(size.shape)
    layers = tuple(f"layer {i}" for i in range(len(size)))
    return KVTable(layers, KV_BITS, size, zero, zero)


def evaluation(model: LoadedModel, settings: ProfileSettings, search: SearchSettings) -> Samples:
    """Held-out sequences.

    Raises:
        ValueError: If they would be those that prices come from.
    """
    if model.is_language_model:
        _check_held_out(search.evaluation, "--eval", settings)
    return evaluation_samples(model, search.evaluation, search.eval_tokens, settings.length)


def second_evaluation(
    model: LoadedModel, settings: ProfileSettings, search: SearchSettings, reporter: Reporter
) -> Samples | None:
    """Held-out sequences of another kind of text, a quarter as many; None without one.

    Raises:
        ValueError: If the text that was asked for is too short, the first one, or one that prices
            come from.
    """
    text = search.second_text
    if text is None or not model.is_language_model:
        return None
    tokens = max(settings.length, search.eval_tokens // 4)
    if search.eval_also is None:  # nobody asked for it: what prevents it is no error
        try:
            return evaluation_samples(model, text, tokens, settings.length)
        except ValueError as error:
            reporter.say(f"No second held-out text: {error}")
            return None
    _check_held_out(text, "--eval-also", settings)
    first = BUILTIN if search.evaluation == PROSE else search.evaluation
    if (BUILTIN if text == PROSE else text) == first or _is_same_text(text, first):
        raise ValueError(
            f"{text} is both --eval and --eval-also, which is there to measure on another kind of "
            f"text. Give it another one, or {NO_TEXT!r}."
        )
    return evaluation_samples(model, text, tokens, settings.length)


def _check_held_out(text: str, option: str, settings: ProfileSettings) -> None:
    """Raise if a text to measure on is among those that prices come from."""
    for share in parse_shares(settings.calibration):
        if _is_same_text(text, share.source):
            raise ValueError(
                f"{text} is both --calibration and {option}: a plan measured on the text it was "
                "made from proves nothing. Give another text to one of them."
            )


def _is_same_text(first: str, second: str) -> bool:
    files = [split_field(name)[0] for name in (first, second)]
    return all(file.is_file() for file in files) and files[0].read_bytes() == files[1].read_bytes()


def _note_unused(model: LoadedModel, settings: ProfileSettings) -> None:
    """Say which settings of a text a model with batches of its own has no use for."""
    if model.is_language_model:
        return
    default = ProfileSettings(settings.model)
    names = ("sequences", "rounding_sequences", "length", "batch_tokens")
    unused = [n for n in names if getattr(settings, n) != getattr(default, n)]
    if unused:
        flags = ", ".join("--" + name.replace("_", "-") for name in unused)
        warnings.warn(
            f"{flags} not used: {settings.model} brings its own batches, which are taken whole.",
            stacklevel=3,
        )


def profiled(work: Work, run: RunFolder, reporter: Reporter) -> SensitivityTable:
    """Profile into a run folder, or take the finished profile that is there.

    Raises:
        ValueError: If the folder holds a profile made with other settings.
    """
    path = run.profile
    if path.exists():
        table = SensitivityTable.load(path)
        _check_same(table, work.blank_table(), path)
        table = _with_model_facts(table, work.provenance)
        if not path.with_suffix(".json").exists():  # the disk was full
            table.save(path)
        reporter.say(f"Profile found in {path}, not computed again")
        work.renderer.complete(work.formats, reporter)  # what it priced is what will be measured
        return table
    run.path.mkdir(parents=True, exist_ok=True)
    with TemporaryFile(dir=run.path):
        pass  # a folder that cannot be written is found out before the slow part
    table = price(
        work.model,
        work.units,
        work.formats,
        work.renderer,
        work.samples,
        work.provenance,
        reporter,
    )
    table.save(path)
    return table


def _check_same(found: SensitivityTable, asked: SensitivityTable, path: Path) -> None:
    """Raise if a finished profile was made with other settings than those asked for."""
    before = {"units": [u.name for u in found.units], "formats": list(found.formats)}
    now = {"units": [u.name for u in asked.units], "formats": list(asked.formats)}
    before |= found.provenance.decisive()
    now |= asked.provenance.decisive()
    for key, value in now.items():
        if before.get(key) != value:
            raise ValueError(
                f"{path} was made with other settings ({key}: {_short(before.get(key))}, now "
                f"{_short(value)}). Choose another --out, which keeps this profile; deleting the "
                "file would lose it."
            )


def _with_model_facts(table: SensitivityTable, known: Provenance) -> SensitivityTable:
    """What a profile of schema 1 does not say of the whole model, and the model at hand does."""
    found = table.provenance
    missing = {
        name: getattr(known, name)
        for name in ("coverage", "file_bytes")
        if getattr(found, name) is None
    }
    return replace(table, provenance=found.model_copy(update=missing))


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."
