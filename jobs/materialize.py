"""From a plan to weights: packed folders, packed models, and plans applied in memory."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .._base.files import atomic_path, check_place
from .._base.hints import did_you_mean
from .._base.progress import Reporter
from ..models.families import can_be_rebuilt, loader_of, quiet
from ..models.find import as_stored, find_matrices, unplanned_tensors
from ..models.identity import function_reference, state_sha256
from ..models.load import check_model, find_device, load_model
from ..models.packed_modules import PackedLinear
from ..models.packed_rows import PackedRowsLinear
from ..models.packing import compute_in, replace
from ..models.rendering import Renderer
from ..models.rest import from_stored_form, packed_origin, to_stored_form
from ..models.samples import Samples
from ..models.side_files import copy_side_files, own_config, write_config
from ..models.sites import places
from ..models.trust import check_code, is_trusted, untrusted
from ..models.units import UnitInfo
from ..models.workload import Batch, LoadedModel, Workload
from ..quantizers.checkpoint import FILE_NAME, read_checkpoint, stored_rows, write_checkpoint
from ..quantizers.format import Format
from ..quantizers.methods import METHODS
from ..quantizers.packed import PackedTensor
from ..quantizers.runtimes import byte_count
from ..search.plan import Plan
from ..sensitivity.estimate import as_loaded_model
from .folder import RunFolder
from .folding import folded
from .renderings import plan_renderer
from .trial import check_runs
from .tuned import tuned_renderer

_HALVED = ("linear", "embedding", "experts")  # sites whose weights stay as they are stored
GENERATION_FILE = "generation_config.json"


def apply(
    model: nn.Module,
    plan: Plan | Path | str,
    batches: Samples | Sequence[Batch] | None = None,
) -> nn.Module:
    """Replace the planned layers of a model by packed ones, in place.

    The model's other layers stay as they are; the original weights of the replaced ones are
    released. Its outputs equal those of the dequantized weights to float32 rounding.

    Args:
        model: The very model the plan was made for (its weights are compared by hash).
        plan: The plan or its path, which may be in the folder of its run.
        batches: Calibration batches of the profile, for rounding methods that need data. Not
            needed with the path of a plan in the folder of its run, nor by a language model whose
            calibration text and tokenizer are found again by their names, which takes the time of
            rounding once more.

    Returns:
        ``model``.

    Raises:
        ValueError: If the plan does not match the model; the first mismatch is named.
    """
    plan, beside = _opened(plan)
    folded(model, plan, beside)
    units = planned_units(model, plan)
    if METHODS.trait(plan.rounding, "needs"):
        loaded = as_loaded_model(model)
        renderer = plan_renderer(plan, loaded, units, beside=beside, batches=batches)
    else:
        renderer = tuned_renderer(Renderer(model, units, plan.rounding), plan, beside)
    packed = dict(_pack(renderer, units, plan, Reporter(quiet=True)))
    replace(model, packed, _aliases(units), plan.row_ranges)
    return model


def quantize(
    plan: Plan | Path | str,
    out: Path | str,
    model: LoadedModel | nn.Module | None = None,
    reporter: Reporter | None = None,
    renderer: Renderer | None = None,
    batches: Samples | Sequence[Batch] | None = None,
    memory: int | None = None,
) -> Path:
    """Write the packed weights a plan describes as a folder.

    The folder holds ``model.safetensors`` (codes, scales and zero points; other tensors in the
    checkpoint's own dtype), ``plan.json`` and, for a Hugging Face model, its configuration and
    tokenizer. It appears whole or not at all.

    Args:
        plan: A plan or its path.
        out: The folder to make.
        model: The original model, when it is loaded already.
        reporter: Where progress is shown.
        renderer: That of the run which made the plan, when it is at hand.
        batches: Calibration batches of the profile, for rounding methods that need data; by
            default those that the plan names.
        memory: Bytes to load the original model in, see :func:`..models.load.load_model`.

    Returns:
        The folder.

    Raises:
        ValueError: If ``out`` exists and is not such a folder, or plan and model do not match.
    """
    plan, beside = _opened(plan)
    out = Path(out).resolve()
    if out.exists() and not is_packed(out):
        raise ValueError(f"{out} exists and is not a packed model. Choose another --out.")
    check_place(out, "--out")
    reporter = reporter or Reporter(quiet=True)
    if model is None:
        original = plan.original()
        check_model(original, "cpu")
        reporter.say(f"Loading {original}")
        model = load_model(original, "cpu", memory)
    model = as_loaded_model(model)
    folded(model.module, plan, beside)
    units = planned_units(model.module, plan)
    if renderer is not None:
        renderer = tuned_renderer(renderer, plan, beside)
    else:
        renderer = plan_renderer(
            plan, model, units, beside=beside, batches=batches, reporter=reporter
        )
    dtype = getattr(torch, model.source_dtype)
    unplanned, tied = unplanned_tensors(model.module, units)
    others = {name: as_stored(tensor, dtype).contiguous() for name, tensor in unplanned.items()}
    rest = to_stored_form(model.origin, others)
    with atomic_path(out) as folder:
        folder.mkdir()
        header = {"aliases": _aliases(units), "tied": tied} | rest.header
        packed, formats = _pack(renderer, units, plan, reporter), assignment_formats(plan)
        sizes = {unit.name: (formats[unit.name], unit.shapes[0]) for unit in units}
        write_checkpoint(folder, packed, rest.tensors, header, plan.row_ranges, sizes)
        plan.save(RunFolder(folder).plan)
        if plan.fold and beside and (kept := beside.fold(plan.fold.sha256)).is_file():
            target = RunFolder(folder).fold(plan.fold.sha256)
            target.parent.mkdir()
            shutil.copyfile(kept, target)
        save_hugging_face_files(model, folder)
        if function_reference(plan.model.id) or (folder / "config.json").is_file():
            check_runs(lambda: load_packed(folder, tokenizer=False), model)
    return out


def is_packed(folder: Path) -> bool:
    """Whether a folder holds weights that :func:`quantize` wrote, and nothing of a run."""
    file = folder / FILE_NAME
    if not file.is_file() or RunFolder(folder).profile.exists():
        return False
    try:
        with safe_open(str(file), framework="pt") as opened:
            return "bitplan" in (opened.metadata() or {})
    except SafetensorError:  # damaged; whoever loads it says how
        return RunFolder(folder).plan.is_file()


def load(folder: Path | str, device: str = "cpu", dtype: torch.dtype | None = None) -> nn.Module:
    """Load a packed folder: the model, ready to call, its planned layers packed.

    Nothing is dequantized at load time: layers unpack their weights when they are called, on a CPU
    from the pages of the file itself. Layers that the plan leaves alone stay in the file's dtype,
    too.

    Args:
        folder: What :func:`quantize` wrote.
        device: ``cpu``, ``cuda`` or ``auto``.
        dtype: Of activations. By default float32 on a CPU and bfloat16 on a GPU, whose kernels
            multiply 16-bit activations; with float32 a GPU unpacks every layer at every call.

    Raises:
        ValueError: If the folder is missing, truncated or does not fit the model's architecture;
            file and tensor are named.
    """
    return load_packed(Path(folder), device, dtype, tokenizer=False).module


def load_packed(
    folder: Path, device: str = "cpu", dtype: torch.dtype | None = None, tokenizer: bool = True
) -> LoadedModel:
    """:func:`load` with identity and, if wanted, the tokenizer."""
    plan = Plan.load(RunFolder(folder).plan)
    packed, stored, header = read_checkpoint(folder)
    others = from_stored_form(header, stored)
    rows = stored_rows(folder)
    formats = {name: tensor.fmt.name for name, tensor in packed.items()}
    if formats != plan.assignments or rows != plan.row_ranges:
        raise ValueError(
            f"{RunFolder(folder).plan} is not the plan {folder / FILE_NAME} was packed from. "
            "Quantize the plan again."
        )
    _check_scales(folder / FILE_NAME, packed)
    skeleton, workload = _skeleton(folder, plan, tokenizer)
    halves = _take_halves(skeleton, others)
    tied = {name: owner for name, owner in header["tied"].items() if owner in others}
    aliases = {
        name.removesuffix(".weight"): owner.removesuffix(".weight")
        for name, owner in header["tied"].items()
        if owner not in others
    }
    replace(skeleton, packed | halves, header["aliases"] | aliases, rows)
    state = {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in others.items()
    }
    _fill(
        folder / FILE_NAME, skeleton, state | {name: state[owner] for name, owner in tied.items()}
    )
    place = find_device(device)
    skeleton.requires_grad_(False).eval().to(place)
    compute_in(skeleton, dtype or (torch.bfloat16 if place.type == "cuda" else torch.float32))
    for module in skeleton.modules():
        if isinstance(module, PackedLinear | PackedRowsLinear):
            module.prepare()
    origin = packed_origin(folder, folder / FILE_NAME, header)
    return LoadedModel(str(folder), skeleton, "float32", workload, origin=origin)


def planned_units(model: nn.Module, plan: Plan, *, unfolded: bool = False) -> tuple[UnitInfo, ...]:
    """The units a plan assigns, one per part.

    Args:
        model: The plan's model. Without weights (:func:`..models.load_structure`) they are not
            compared by hash.
        plan: The plan.
        unfolded: Whether the model is as it was before scales were folded into it, if any were.

    Raises:
        ValueError: If a planned module is not in the model, or the weights are other weights.
    """
    units = find_matrices(model, plan.row_ranges)
    names = {unit.name for unit in units}
    for name in plan.assignments:
        if name not in names:
            raise ValueError(
                f"The plan does not match the model: it assigns {name!r} a format, but the model "
                f"has no such layer.{did_you_mean(name, names)} The plan is for {plan.model.id!r}."
            )
    plan.original()  # raises where it is not known
    without_weights = next(model.parameters()).is_meta
    wanted = plan.fold.model_sha256 if plan.fold and unfolded else plan.model.sha256
    actual = wanted if without_weights else state_sha256(model)
    if actual != wanted:
        raise ValueError(
            f"The plan was made for other weights of {plan.model.id!r} (sha256 "
            f"{wanted[:12]}…, this model has {actual[:12]}…). Search again for these."
        )
    planned = tuple(unit for unit in units if unit.name in plan.assignments)
    formats, count = assignment_formats(plan), byte_count(plan.runtime)
    size = sum(count(formats[u.name], shape) for u in planned for shape in u.shapes)
    if size != plan.bytes:
        where = f" for {plan.runtime}" if plan.runtime else ""
        raise ValueError(
            f"The plan says {plan.bytes:,} B, but its assignments take {size:,} B{where}: it was "
            "changed after it was made, or a version that counted otherwise made it. Solve again."
        )
    return planned


def assignment_formats(plan: Plan) -> dict[str, Format]:
    """Canonical module name -> parsed format of a plan."""
    return {name: Format.parse(spec) for name, spec in plan.assignments.items()}


def _pack(
    renderer: Renderer, units: tuple[UnitInfo, ...], plan: Plan, reporter: Reporter
) -> Iterator[tuple[str, PackedTensor]]:
    formats = assignment_formats(plan)
    with reporter.bar("Packing", len(units), [unit.weights for unit in units]) as advance:
        for unit in units:
            yield unit.name, renderer.store.packed(unit.name, formats[unit.name])
            advance(1)


def _opened(plan: Plan | Path | str) -> tuple[Plan, RunFolder | None]:
    """A plan, and the folder it lies in."""
    if isinstance(plan, Plan):
        return plan, None
    path = Path(plan)
    return Plan.load(path), RunFolder.around(path)


def _aliases(units: tuple[UnitInfo, ...]) -> dict[str, str]:
    """Alias -> canonical matrix name."""
    return {alias: unit.parts[0].module for unit in units for alias in unit.aliases}


def save_hugging_face_files(model: LoadedModel, folder: Path) -> None:
    """Configuration, tokenizer and all else that lies beside a checkpoint's weights.

    A model that came from such a folder gives the files as they are there; of another one those
    are made that transformers can rebuild the architecture from, if it can.
    """
    own = None if model.origin is None else own_config(model.origin.folder)
    if model.origin is not None and own is not None:
        copy_side_files(model.origin.folder, folder)
        write_config(own, folder)
        return
    if not can_be_rebuilt(model.module):
        return
    config = copy.deepcopy(model.module.config)
    if hasattr(config, "quantization_config"):  # how the source file was stored
        del config.quantization_config
    config.save_pretrained(folder)  # type: ignore[operator,union-attr]
    generation = getattr(model.module, "generation_config", None)
    if generation is not None:
        generation.to_json_file(folder / GENERATION_FILE)
    if model.workload.tokenizer is not None:
        model.workload.tokenizer.save_pretrained(folder)


def _check_scales(path: Path, packed: Mapping[str, PackedTensor]) -> None:
    for name, weight in packed.items():
        scale = weight.tensors.get("scale")
        if scale is not None and not scale.isfinite().all():
            raise ValueError(
                f"{path} is damaged: {name + '.scale'!r} has values that are no numbers. Write or "
                "copy it again."
            )


def _take_halves(model: nn.Module, others: dict[str, Tensor]) -> dict[str, PackedTensor]:
    """Move the 16-bit weights of the large kinds of layers out of ``others``.

    As packed weights they are used as they are stored, at half the memory of float32.
    """
    formats = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    taken = {}
    for place in places(model):
        weight = others.get(place.key)
        if place.site_name in _HALVED and weight is not None and weight.dtype in formats:
            fmt = Format.parse(formats[weight.dtype])
            matrix = place.matrix(others.pop(place.key)).contiguous()
            taken[place.name] = PackedTensor(fmt, place.shape, {"weight": matrix})
    return taken


def _fill(path: Path, model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a model its other tensors.

    Raises:
        ValueError: If one is missing, unknown or of another shape.
    """
    try:
        result = model.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:  # sizes; the first line says nothing
        detail = str(error).splitlines()[-1].strip()
        raise ValueError(
            f"{path} does not fit the architecture: {detail} Quantize the plan again."
        ) from error
    missing = [name for name, p in model.named_parameters() if p.is_meta]
    if missing or result.unexpected_keys:
        culprit = (missing or result.unexpected_keys)[0]
        raise ValueError(
            f"{path} does not fit the architecture: tensor {culprit!r} is "
            f"{'missing' if missing else 'unknown to the model'}. Quantize the plan again."
        )


def _skeleton(folder: Path, plan: Plan, with_tokenizer: bool) -> tuple[nn.Module, Workload]:
    """The architecture without weights, and the workload that feeds it."""
    function = function_reference(plan.model.id)
    if function and not is_trusted() and function[0].resolve().is_relative_to(folder.resolve()):
        raise ValueError(untrusted(str(folder), (function[0].name,)))
    if function or not (folder / "config.json").is_file():
        if not function:
            raise ValueError(
                f"{folder} was packed from a {plan.model.id} made in Python, which cannot be "
                "rebuilt from a folder. Make the module and call bitplan.apply(module, plan), or "
                "search it as file.py:function."
            )
        original = load_model(plan.model.id, "cpu")
        return original.module, original.workload
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    check_code(folder)
    trusted = {"trust_remote_code": is_trusted()}
    config = AutoConfig.from_pretrained(folder, **trusted)
    with quiet(), init_empty_weights(include_buffers=False):
        module = loader_of(config).from_config(config, dtype=torch.float32, **trusted)
    if (folder / GENERATION_FILE).is_file():
        module.generation_config = GenerationConfig.from_pretrained(folder)
    tokenizer = None
    if with_tokenizer and (folder / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(folder, **trusted)
    return module, Workload(module, tokenizer=tokenizer)
