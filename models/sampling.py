"""Sequences that a language model writes itself, from a random token or given first words."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from .names import LANGUAGES, SELF
from .openings import OPENINGS
from .vocabulary import check_tokens
from .workload import LoadedModel

_OTHER_SEED = 1_000_003  # sequences sampled after `skip` others come from another seed
_BLOCK = 32  # sequences sampled at a time for a mixture
_CACHES = ("cache", "past_key_values")  # as versions of transformers call it
_kept: WeakKeyDictionary[nn.Module, dict[tuple[str, int, int, int], Tensor]] = WeakKeyDictionary()


def sampled(
    model: LoadedModel, source: str, skip: int, count: int, length: int, seed: int
) -> Tensor:
    """Sequences [count, length] of ``self`` or ``languages``, other ones for another ``skip``."""
    sampler = {SELF: sample_freely, LANGUAGES: sample_languages}[source]
    return sampler(model, count, length, seed + skip * _OTHER_SEED)


def in_blocks(
    model: LoadedModel, source: str, skip: int, count: int, length: int, seed: int
) -> Tensor:
    """The same out of one order of sequences, whatever part of it is asked for.

    They are sampled some at a time and kept as long as the model: a search asks for a few more
    again and again, and a step takes about as long for one sequence as for many.
    """
    kept = _kept.setdefault(model.module, {})
    blocks = []
    for k in range(skip // _BLOCK, (skip + count - 1) // _BLOCK + 1):
        key = (source, length, seed, k)
        if key not in kept:
            kept[key] = sampled(model, source, k * _BLOCK, _BLOCK, length, seed)
        blocks.append(kept[key])
    first = skip % _BLOCK
    return torch.cat(blocks)[first : first + count]


def sample_freely(model: LoadedModel, sequences: int, length: int, seed: int) -> Tensor:
    """Sample sequences [N, length] at temperature 1, each from a random first token."""
    generator = torch.Generator().manual_seed(seed)
    tokenizer = model.workload.tokenizer
    vocabulary = model.module.get_input_embeddings().num_embeddings  # type: ignore[operator]
    first = torch.randint(min(len(tokenizer), vocabulary), (sequences, 1), generator=generator)
    prefix = first_tokens(tokenizer)
    check_tokens(model, prefix, "every text")
    return _continued(
        model, [[*prefix, token] for token in first[:, 0].tolist()], length, generator
    )


def sample_languages(model: LoadedModel, sequences: int, length: int, seed: int) -> Tensor:
    """Sample sequences [N, length] at temperature 1, from first words in several languages.

    The languages take turns, and most of a sequence, three quarters at least, is sampled; a model
    that does not know a language writes what it takes for it.
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
    most = max(1, length // 4)
    check_tokens(model, [*prefix, *(token for start in starts for token in start)], "the openings")
    rows = [[*prefix, *starts[i % len(starts)][:most]] for i in range(sequences)]
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
        taken = inspect.signature(model.module.forward).parameters
        self._cache = next((name for name in _CACHES if name in taken), None)

    def __call__(self, ids: Tensor, seen: int) -> Tensor:
        ids = ids.to(self._model.device)
        if self._cache is None:
            return self._model.logits(ids)[:, -1]
        new = {"input_ids": ids[:, seen:], self._cache: self._past, "use_cache": True}
        output = self._model.module(**new)
        self._past = getattr(output, self._cache, None)
        if self._past is None:  # takes one and keeps none
            self._cache = None
        last: Tensor = output.logits[:, -1].float()
        return last
