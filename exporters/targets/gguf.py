"""GGUF, the files of llama.cpp, and its list of tensor types."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad

from ...jobs.folding import FoldedScales
from ...models.measure import Run
from ...models.workload import Batch, LoadedModel
from ...quantizers.format import Format
from ..source import Source
from . import EXPORTERS, Exporter, Stored


@EXPORTERS.register("gguf")
class Gguf(Exporter):
    """For llama.cpp; types for llama-quantize."""

    runtimes = ("llama.cpp",)
    extra = "gguf"
    module = "llama_cpp"
    form = "file"
    copies = True
    suffix = ".gguf"
    config_suffix = ".txt"
    noise = "llama.cpp rounds activations to 8 bits before it multiplies with quantized weights"
    max_kl = 0.03  # twice what a uniform plan of K types measures

    def config(self, source: Source) -> str:
        """One anchored pattern per matrix for ``--tensor-type-file``; the first match counts."""
        from ...models.gguf_names import gguf_tensors
        from ..layouts.gguf import TYPE_OF_FORMAT, architecture_of

        formats = source.formats
        modules = [unit.name for unit in source.everything]
        names = gguf_tensors(*architecture_of(source.model), modules)
        _check_named([module for module in modules if module in formats], names, source)
        lines = []
        for module, tensor in names.items():
            kind = TYPE_OF_FORMAT[formats[module].name] if module in formats else "F16"
            lines.append(f"^{re.escape(tensor)}$={kind.lower()}")
        if len(names) < len(modules):  # matrices that are not alone in their tensor
            lines.append(".*=f16")
        return "\n".join(lines) + "\n"

    def usage(self, path: Path, source: Source) -> str:
        """How to use what was written."""
        if path.suffix == self.suffix:
            return f"llama-cli -m {shlex.quote(str(path))}"
        return (
            f"llama-quantize --pure --tensor-type-file {path} MODEL-F16.gguf MODEL.gguf q8_0  "
            "(it rounds again with its own quantizer; --to gguf without --plan-only keeps ours)"
        )

    def write(self, source: Source, out: Path) -> None:
        """Copy the GGUF the model came from, or ``--like``, with our blocks in it."""
        from ..layouts import gguf as files

        base = files.base_file(source.model, source.plan.model.id, source.like)
        reader = files.open_reader(base)
        formats, shapes = source.formats, source.shapes
        modules = [unit.name for unit in source.units]
        owner = files.module_names(reader, source.model)
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        where: dict[str, str] = {}
        for tensor, found in owner.items():
            module = source.aliases.get(found, found)
            if module in formats and tensor in tensors:
                where[tensor] = module
        _check_named(modules, {module: tensor for tensor, module in where.items()}, source)
        kinds: dict[str, tuple[str, tuple[int, ...], int]] = {}
        for tensor, module in where.items():
            fmt, shape = formats[module], shapes[module]
            if files.matrix_shape(tensors[tensor]) != shape:
                raise ValueError(
                    f"{base} has {tensor} as {list(map(int, tensors[tensor].shape))}, but the "
                    f"model has {module!r} as {list(shape)}. Give the GGUF of this very model."
                )
            size = fmt.stored_bytes(shape)
            kinds[tensor] = files.TYPE_OF_FORMAT[fmt.name], shape, size
        plain = dict(source.model.module.named_modules())
        folds = source.folds() if source.folds else None
        vectors = _folded_vectors(source, folds, tensors) if folds else {}
        for tensor, vector in vectors.items():
            kinds[tensor] = "F32", tuple(vector.shape), vector.nbytes

        def block(tensor: str, reader: Any) -> files.Block:
            advance(1)
            if tensor in vectors:
                return files.Block("F32", tuple(vectors[tensor].shape), vectors[tensor].numpy())
            module = where[tensor]
            theirs = files.weight_of(tensors[tensor], None)
            ours = files.original_weight(plain.get(module))
            rows = shapes[module][0]
            if ours is None:  # a packed folder: the weights it was made from are gone
                order = files.usual_order(reader, tensor, rows)
                return files.blocks_of(source.packed(module), order)

            if folds:
                ours = folds.unfolded(module, ours)

            def distance(order: torch.Tensor | None) -> float:
                return files.relative_distance(theirs, ours if order is None else ours[order])

            order = files.row_order(reader, tensor, rows, distance)
            if (far := distance(order)) > _most_distant(tensors[tensor].tensor_type.name):
                raise ValueError(
                    f"{tensor} of {base} is not {module!r} of {source.model.id}: they differ by "
                    f"{far:.1%}. Give --like a GGUF of this very model, in F16, BF16 or Q8_0."
                )
            return files.blocks_of(source.packed(module), order)

        with source.reporter.bar("Writing GGUF", len(kinds)) as advance:
            extra = {"bitplan.bits_per_weight": source.plan.bpw}
            files.copy_with(base, out, kinds, block, extra)

    def recognizes(self, path: Path) -> bool:
        """By its first four bytes."""
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"

    def read(self, path: Path, model: LoadedModel | None = None) -> Iterator[Stored]:
        """All matrices in a block format or float; types without a format by the nearest one."""
        from ..layouts import gguf as files

        reader = files.open_reader(path)
        names = files.module_names(reader, model)
        plain = dict(model.module.named_modules()) if model else {}
        for tensor in reader.tensors:
            shape, module = files.matrix_shape(tensor), names.get(tensor.name)
            if shape is None or module is None:
                continue
            kind = tensor.tensor_type.name
            exact = kind in files.FORMAT_OF_TYPE
            name = files.FORMAT_OF_TYPE.get(kind) or files.NEAREST.get(kind)
            if name is None:
                raise ValueError(f"{path}: {tensor.name} has type {kind}, which is unknown here.")

            def weight(
                tensor: Any = tensor, module: str = module, rows: int = shape[0]
            ) -> torch.Tensor:
                theirs = files.weight_of(tensor, None)
                ours = files.original_weight(plain.get(module))
                order = files.usual_order(reader, tensor.name, rows)
                if ours is not None:
                    order = files.row_order(
                        reader,
                        tensor.name,
                        rows,
                        lambda o: files.relative_distance(theirs, ours if o is None else ours[o]),
                    )
                return files.weight_of(tensor, order)

            size = int(tensor.n_bytes)
            yield Stored(module, shape, Format.parse(name), size, weight, exact)

    def installed(self) -> bool:
        """Whether llama-cpp-python or xllamacpp is there."""
        return any(importlib.util.find_spec(name) for name in ("llama_cpp", "xllamacpp"))

    def most_tokens(self) -> int | None:
        """xllamacpp answers with one distribution per request."""
        return None if importlib.util.find_spec("llama_cpp") else 48

    def logits(self, path: Path) -> Run:
        """With llama-cpp-python if it is installed, else with xllamacpp; a float32 KV cache."""
        if importlib.util.find_spec("llama_cpp"):
            return _llama_cpp(path)
        return _xllamacpp(path)


def _folded_vectors(
    source: Source, folds: FoldedScales, tensors: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """The weights of norms and the biases that scales were folded into, by tensor of the file.

    llama.cpp keeps the factors themselves of norms that add 1 to their weight.

    Raises:
        ValueError: If the file has no tensor for a norm.
    """
    from ...models.gguf_names import gguf_tensors
    from ..layouts import gguf as files

    architecture = files.architecture_of(source.model)
    names = gguf_tensors(*architecture, [fold.source for fold in folds.folds])
    found = {}
    for fold in folds.folds:
        module: Any = source.model.module.get_submodule(fold.source)
        name = names.get(fold.source, "")
        if fold.offset is not None:
            if name not in tensors:
                raise ValueError(
                    f"The file has no tensor for {fold.source!r}, which scales were folded into. "
                    "Search again without --fold."
                )
            found[name] = (module.weight.detach() + fold.offset).float().contiguous()
        bias = name.removesuffix("weight") + "bias"
        if getattr(module, "bias", None) is not None and bias in tensors:
            found[bias] = module.bias.detach().float().contiguous()
    return found


def _check_named(modules: list[str], names: dict[str, str], source: Source) -> None:
    missing = [module for module in modules if module not in names]
    if missing:
        raise ValueError(
            f"llama.cpp has no tensor for {missing[0]!r} of {source.model.id} ({len(missing)} in "
            "all). Leave it out of the plan (--exclude)."
        )


def _most_distant(kind: str) -> float:
    """How far the file's weights may be from the model's: nothing but their rounding."""
    return 1e-6 if kind == "F32" else 0.01


def _llama_cpp(path: Path) -> Run:
    from llama_cpp import GGML_TYPE_F32, Llama

    model: Any = None

    def run(batch: Batch) -> torch.Tensor:
        nonlocal model
        assert isinstance(batch, torch.Tensor)
        if model is None or model.n_ctx() < batch.shape[1]:
            with _silence():
                model = Llama(
                    str(path),
                    n_ctx=max(256, batch.shape[1]),
                    n_batch=batch.shape[1],
                    n_threads=torch.get_num_threads(),
                    n_threads_batch=torch.get_num_threads(),
                    logits_all=True,
                    type_k=GGML_TYPE_F32,
                    type_v=GGML_TYPE_F32,
                    n_gpu_layers=0,
                    verbose=False,
                )
        rows = []
        for tokens in batch.tolist():
            model.reset()
            model.eval(tokens)
            rows.append(np.array(model.scores[: len(tokens)]))
        return torch.from_numpy(np.stack(rows))

    return run


def _xllamacpp(path: Path) -> Run:
    """Through its server: the whole distribution after every prefix, as log-probabilities."""
    from xllamacpp import CommonParams, Server

    parameters = CommonParams()
    parameters.model.path = str(path)
    parameters.n_ctx = 1024
    parameters.n_parallel = 1
    parameters.warmup = False
    parameters.n_gpu_layers = 0
    parameters.verbosity = 0
    parameters.cpuparams.n_threads = torch.get_num_threads()
    with _silence():
        server = Server(parameters)

    def after(tokens: list[int]) -> dict[int, float]:
        """Log-probabilities by token; none where the likeliest is a part of a letter.

        The server gives no answer then: it waits for the bytes that complete the letter.
        """
        answer = server.handle_completions(
            {
                "prompt": tokens,
                "max_tokens": 1,
                "logprobs": 1_000_000,
                "temperature": 0.0,  # the answer must not depend on a draw
                "seed": 0,
                "cache_prompt": True,
            }
        )
        content = (answer["choices"][0].get("logprobs") or {}).get("content") or ()
        top = content[0].get("top_logprobs", ()) if content else ()
        return {entry["id"]: entry["logprob"] for entry in top}

    def run(batch: Batch) -> torch.Tensor:
        assert isinstance(batch, torch.Tensor)
        rows = []
        for tokens in batch.tolist():
            found = [after(tokens[: i + 1]) for i in range(len(tokens))]
            size = 1 + max((max(one) for one in found if one), default=0)
            logits = torch.full((len(tokens), size), -40.0)
            for i, one in enumerate(found):
                logits[i, list(one)] = torch.tensor(list(one.values()))
            logits.clamp_(min=-40)
            logits[[i for i, one in enumerate(found) if not one]] = -torch.inf
            rows.append(logits)
        widest = max(row.shape[1] for row in rows)
        padded = [pad(row, (0, widest - row.shape[1]), value=-40.0) for row in rows]
        logits = torch.stack(padded)
        logits[logits[..., 0] == -torch.inf] = -torch.inf  # what was padded, too
        return logits

    return run


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Send what a library prints to the process's standard error to nowhere."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)
