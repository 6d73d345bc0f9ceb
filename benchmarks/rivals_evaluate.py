"""One evaluator for every rival: its own weights in the original model, on the same tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitplan._base.files import atomic_path
from bitplan._base.progress import Reporter
from bitplan.exporters.configs.folder import TensorFiles
from bitplan.exporters.importing import recognize
from bitplan.exporters.layouts.gguf import open_reader
from bitplan.models.measure import Measurement, Run, measure
from bitplan.models.samples import Samples
from bitplan.models.workload import Batch, LoadedModel

DEQUANTIZED, BYTES = "dequantized.safetensors", "bytes.json"
CONSTANT = "g_idx"  # of GPTQ: the group of every column, which counts up where nothing is reordered


class Matrix(NamedTuple):
    """A matrix of a rival: its name, the bytes it is stored in, and what it means, float32."""

    name: str
    nbytes: int
    weight: Tensor


@dataclass(frozen=True)
class Scores:
    """What a model did on one text.

    Attributes:
        kl: KL(original || model) of every sequence, mean nats per token.
        stderr: Standard error of the mean of ``kl`` over sequences.
        same_top1: Share of tokens with the original's likeliest next token.
        ppl: Perplexity.
        ppl_original: That of the original model.
        tokens: Tokens measured.
    """

    kl: list[float]
    stderr: float
    same_top1: float
    ppl: float | None
    ppl_original: float | None
    tokens: int

    @property
    def mean(self) -> float:
        """Mean KL in nats per token."""
        return sum(self.kl) / len(self.kl)


def stored_matrices(path: Path, model: LoadedModel, floats: Path | None = None) -> Iterator[Matrix]:
    """The matrices of a rival's file or folder, one at a time.

    Args:
        path: A folder with what the rival's own program dequantized (``dequantized.safetensors``,
            ``bytes.json``), or any file or folder that ``bitplan import`` reads.
        model: The original model.
        floats: The same GGUF file with all weights as floats, written by llama.cpp itself; then
            the weights come from there, and the bytes from ``path``.
    """
    if (path / DEQUANTIZED).is_file():
        sizes = json.loads((path / BYTES).read_text(encoding="utf-8"))
        with safe_open(path / DEQUANTIZED, framework="pt") as file:
            for name, size in sizes.items():
                yield Matrix(name, size, file.get_tensor(name).float())
        return
    if floats is not None:
        sizes = {tensor.name: int(tensor.n_bytes) for tensor in open_reader(path).tensors}
        read = recognize(floats)[1].read(floats, model)
        tensors = _tensor_of_module(floats, model)
        for stored in read:
            yield Matrix(stored.name, sizes[tensors[stored.name]], stored.weight())
        return
    constants = constant_bytes(path)
    for stored in recognize(path)[1].read(path, model):
        yield Matrix(stored.name, stored.nbytes - constants.get(stored.name, 0), stored.weight())


def _tensor_of_module(path: Path, model: LoadedModel) -> dict[str, str]:
    from bitplan.exporters.layouts.gguf import module_names

    return {module: tensor for tensor, module in module_names(open_reader(path), model).items()}


def constant_bytes(folder: Path) -> dict[str, int]:
    """Bytes of ``g_idx`` per module, where it says no more than the group size does.

    Raises:
        ValueError: If columns were reordered: then the groups are information, and count.
    """
    files = TensorFiles(folder)
    found = {}
    for name in files.modules_with(CONSTANT):
        groups = files.get(f"{name}.{CONSTANT}")
        if bool((groups.diff() < 0).any()):
            raise ValueError(f"{folder}: the columns of {name!r} are reordered. Quantize without.")
        found[name] = groups.nbytes
    return found


class Evaluator:
    """Measures models that differ from the original in some matrices.

    Args:
        model: The original model; its weights are changed while another is measured.
        texts: The held-out texts by name.
        folder: Where the original's last hidden states are kept, so that it runs once.
        reporter: Where progress is shown.
    """

    def __init__(
        self, model: LoadedModel, texts: Mapping[str, Samples], folder: Path, reporter: Reporter
    ) -> None:
        self._model, self._texts, self._reporter = model, texts, reporter
        self._hidden = {name: self._states(text, folder) for name, text in texts.items()}

    def matrices(self, matrices: Iterable[Matrix], what: str) -> dict[str, Scores]:
        """Scores by text of the model with these matrices in the place of its own."""
        with substituted(self._model, matrices):
            return self.run(self._model.logits, what)

    def run(self, run: Run, what: str) -> dict[str, Scores]:
        """Scores by text of anything that gives logits."""
        return {name: self._score(name, text, run, what) for name, text in self._texts.items()}

    def _score(self, name: str, text: Samples, run: Run, what: str) -> Scores:
        module: Any = self._model.module
        states = iter(self._hidden[name])
        top: list[Tensor] = []
        same = 0

        def reference(_batch: Batch) -> Tensor:
            logits: Tensor = module.lm_head(next(states))
            top[:] = [logits.argmax(-1)]
            return logits

        def candidate(batch: Batch) -> Tensor:
            nonlocal same
            logits = run(batch)
            same += int((logits.argmax(-1) == top[0]).sum())
            return logits

        with self._reporter.bar(f"Measuring {what} on {name}", 2 * len(text.batches)) as advance:
            measured, ppl = measure(
                self._model, {"it": candidate}, text, lambda: advance(1), reference=reference
            )
        return _scores(measured["it"], same, ppl)

    def _states(self, text: Samples, folder: Path) -> list[Tensor]:
        """The original's last hidden states, batch by batch: its logits less the head."""
        path = folder / f"original-{text.sha256[:16]}.safetensors"
        if not path.is_file():
            module: Any = self._model.module
            states = {}
            with (
                torch.no_grad(),
                self._reporter.bar("Running the original", len(text.batches)) as advance,
            ):
                for i, batch in enumerate(text.batches):
                    states[str(i)] = module.model(input_ids=batch, use_cache=False)[0].contiguous()
                    advance(1)
            with atomic_path(path) as temporary:
                save_file(states, temporary)
        found = load_file(path)
        return [found[str(i)] for i in range(len(text.batches))]


def _scores(found: Measurement, same: int, ppl_original: float | None) -> Scores:
    return Scores(
        kl=found.kl.tolist(),
        stderr=found.kl_stderr,
        same_top1=same / found.tokens,
        ppl=found.perplexity,
        ppl_original=ppl_original,
        tokens=found.tokens,
    )


@contextmanager
def substituted(model: LoadedModel, matrices: Iterable[Matrix]) -> Iterator[None]:
    """The model with other matrices inside the block.

    Raises:
        ValueError: If a matrix has another shape than the model's, or values that are no numbers.
    """
    before: dict[str, Tensor] = {}
    try:
        for matrix in matrices:
            weight = model.module.get_submodule(matrix.name).weight
            assert isinstance(weight, Tensor)
            if weight.shape != matrix.weight.shape or not matrix.weight.isfinite().all():
                raise ValueError(
                    f"{matrix.name} is {list(matrix.weight.shape)} there and {list(weight.shape)} "
                    "in the model, or not finite: the file is another model's, or damaged."
                )
            before[matrix.name] = weight.detach().clone()
            with torch.no_grad():
                weight.copy_(matrix.weight)
        yield
    finally:
        for name, original in before.items():
            with torch.no_grad():
                model.module.get_submodule(name).weight.copy_(original)  # type: ignore[operator]
