"""A model and what it is run on: batches in, logits out."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .origin import Origin

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
        file_bytes: Bytes of the file it came in, where ``source_dtype`` does not give them: one
            whose weights are quantized.
        origin: The checkpoint it came from; None for a model without one in Hugging Face's form.
    """

    id: str
    module: nn.Module
    source_dtype: str
    workload: Workload
    revision: str | None = None
    file_bytes: int | None = None
    origin: Origin | None = None

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


def take(batch: Batch, low: int, high: int, step: int = 1) -> Batch:
    """Some samples of a batch; what has another first dimension than samples stays whole."""
    count = samples_in(batch)

    def some(value: Any) -> Any:
        divides = isinstance(value, Tensor) and value.dim() > 0 and len(value) == count
        return value[low:high:step] if divides else value

    if isinstance(batch, Tensor):
        return batch[low:high:step]
    if isinstance(batch, Mapping):
        return {key: some(value) for key, value in batch.items()}
    return tuple(some(value) for value in batch)


def memory_of(tensor: Tensor) -> tuple[Hashable, ...] | None:
    """What two tensors have in common that are the same memory seen alike; None without any."""
    address = tensor.data_ptr()
    return (address, tensor.shape, tensor.stride(), tensor.dtype) if address else None


def tie(module: nn.Module) -> None:
    """Let modules whose parameters are the same memory share one parameter, in place.

    Their gradients then add up, and what stands for one stands for all.
    """
    owners: dict[Hashable, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and (memory := memory_of(parameter)):
                part._parameters[name] = owners.setdefault(memory, parameter)


def parameter_dtype(module: nn.Module) -> str:
    """Name of the widest floating point type among the parameters."""
    dtypes = {p.dtype for p in module.parameters() if p.is_floating_point()} or {torch.float32}
    return str(max(dtypes, key=lambda dtype: dtype.itemsize)).removeprefix("torch.")


def _default_logits(output: Any) -> Any:
    return getattr(output, "logits", output)
