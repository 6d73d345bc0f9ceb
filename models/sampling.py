"""Sequences that a language model writes itself, from a random token or given first words."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .openings import OPENINGS
from .workload import LoadedModel


def sample_freely(model: LoadedModel, sequences: int, length: int, seed: int) -> Tensor:
    """Sample sequences [N, length] at temperature 1, each from a random first token."""
    generator = torch.Generator().manual_seed(seed)
    tokenizer = model.workload.tokenizer
    vocabulary = model.module.get_input_embeddings().num_embeddings  # type: ignore[operator]
    first = torch.randint(min(len(tokenizer), vocabulary), (sequences, 1), generator=generator)
    prefix = first_tokens(tokenizer)
    return _continued(
        model, [[*prefix, token] for token in first[:, 0].tolist()], length, generator
    )


def sample_languages(model: LoadedModel, sequences: int, length: int, seed: int) -> Tensor:
    """Sample sequences [N, length] at temperature 1, from first words in several languages.

    The languages take turns; a model that does not know one writes what it takes for it.
    """
    tokenizer = model.workload.tokenizer
    rng = np.random.default_rng(seed)
    languages = [list(OPENINGS)[i] for i in rng.permutation(len(OPENINGS))]
    texts = [
        OPENINGS[language][i]
        for i in rng.permutation(min(map(len, OPENINGS.values())))
        for language in languages
    ]
    starts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    prefix = first_tokens(tokenizer)
    rows = [[*prefix, *starts[i % len(starts)]] for i in range(sequences)]
    return _continued(model, rows, length, torch.Generator().manual_seed(seed))


def first_tokens(tokenizer: Any) -> list[int]:
    """The BOS token, for the tokenizers that put one before every text."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and bos in tokenizer("")["input_ids"][:1] else []


def _continued(
    model: LoadedModel, starts: Sequence[list[int]], length: int, generator: torch.Generator
) -> Tensor:
    """Given first tokens, of any number per sequence, and sampled ones up to ``length``."""
    given = torch.tensor([min(len(start), length) for start in starts])
    ids = torch.zeros(len(starts), length, dtype=torch.long)
    for row, start in zip(ids, starts, strict=True):
        row[: min(len(start), length)] = torch.tensor(start[:length])
    next_token = _Predictor(model)
    done = 0
    with torch.no_grad():
        for position in range(int(given.min()), length):
            probabilities = next_token(ids[:, :position], done).softmax(-1).cpu()
            done = position
            drawn = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
            ids[:, position] = torch.where(position < given, ids[:, position], drawn)
    return ids


class _Predictor:
    """Logits [N, classes] after token ids; keys and values are kept where the model can."""

    def __init__(self, model: LoadedModel) -> None:
        self._model, self._past = model, None
        self._caches = "past_key_values" in inspect.signature(model.module.forward).parameters

    def __call__(self, ids: Tensor, seen: int) -> Tensor:
        ids = ids.to(self._model.device)
        if not self._caches:
            return self._model.logits(ids)[:, -1]
        output = self._model.module(
            input_ids=ids[:, seen:], past_key_values=self._past, use_cache=True
        )
        self._past = output.past_key_values
        self._caches = self._past is not None
        last: Tensor = output.logits[:, -1].float()
        return last
