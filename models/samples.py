"""Calibration and evaluation batches, drawn from texts or written by the model itself."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .mixture import Share, describe_shares, parse_shares, turns
from .names import BUILTIN, MIXTURE, SAMPLED
from .sampling import first_tokens, in_blocks, sampled
from .texts import Split, read_text
from .vocabulary import check_tokens
from .workload import Batch, LoadedModel, samples_in, take


@dataclass(frozen=True, slots=True)
class Samples:
    """Model inputs in batches, with a record of where they came from.

    Attributes:
        batches: Inputs of the model; a language model gets token ids [samples, length].
        source: Name of a text, a file name, several of them with percentages, or ``workload``.
        length: Tokens per sequence; None for models that do not read tokens.
        seed: Seed that chose the sequences.
        sha256: Hash of the inputs themselves.
        texts: The texts and their weights where they are several; files by their names alone.
    """

    batches: tuple[Batch, ...]
    source: str
    length: int | None
    seed: int
    sha256: str
    texts: tuple[Share, ...] = ()

    @property
    def count(self) -> int:
        """Number of samples (sequences)."""
        return sum(samples_in(batch) for batch in self.batches)

    def head(self, count: int) -> Samples:
        """The first whole batches that hold at least ``count`` samples."""
        kept: list[Batch] = []
        for batch in self.batches:
            kept.append(batch)
            if sum(map(samples_in, kept)) >= count:
                break
        return replace(self, batches=tuple(kept))

    def first(self, count: int) -> Samples:
        """Exactly the first ``count`` samples, where batches are tensors; else as :meth:`head`."""
        head = self.head(count)
        last = head.batches[-1]
        surplus = head.count - count
        if surplus <= 0 or not isinstance(last, Tensor):
            return head
        return replace(head, batches=(*head.batches[:-1], last[:-surplus]))

    def tail(self, count: int) -> Samples:
        """The last whole batches that hold at most ``count`` samples, and at least one batch."""
        kept: list[Batch] = [self.batches[-1]]
        for batch in reversed(self.batches[:-1]):
            if sum(map(samples_in, kept)) + samples_in(batch) > count:
                break
            kept.insert(0, batch)
        return replace(self, batches=tuple(kept))

    def shard(self, index: int, count: int) -> Samples:
        """Every ``count``-th sample, from number ``index`` on.

        The shards 0 to ``count - 1`` hold every sample once, so that a sum over samples is the sum
        of the shards' sums; sample j of a shard is number ``index + j * count`` of all.  Batches
        are about as large as before where all inputs are alike.

        Raises:
            ValueError: If there is no such shard, or it would be empty.
        """
        if not 0 <= index < count:
            raise ValueError(f"There is no shard {index} of {count}; they count from 0.")
        if count == 1:
            return self
        if index >= self.count:
            raise ValueError(
                f"Shard {index} of {count} is empty: there are only {self.count} samples. Use "
                "fewer shards, or more samples."
            )
        parts: list[Batch] = []
        first = 0
        for batch in self.batches:
            offset, size = (index - first) % count, samples_in(batch)
            first += size
            if offset < size:
                parts.append(take(batch, offset, size, count))
        tensors = [part for part in parts if isinstance(part, Tensor)]
        if len(tensors) == len(parts) and len({(x.shape[1:], x.dtype) for x in tensors}) == 1:
            parts = list(torch.cat(tensors).split(max(map(samples_in, self.batches))))
        return self.of_batches(parts)

    def joined(self, others: Samples) -> Samples:
        """These samples, and then others."""
        return self.of_batches((*self.batches, *others.batches))

    def of_batches(self, batches: Sequence[Batch]) -> Samples:
        """Other batches of the same origin, such as some of these."""
        return replace(self, batches=tuple(batches), sha256=_hash(batches))

    def describe(self) -> dict[str, Any]:
        """Provenance for plan.json and the profile."""
        texts = [{"source": text.source, "weight": text.weight} for text in self.texts]
        return {
            "source": self.source,
            "sequences": self.count,
            "length": self.length,
            "seed": self.seed,
            "sha256": self.sha256,
        } | ({"texts": texts} if texts else {})


def calibration_samples(
    model: LoadedModel,
    source: str | Sequence[Share] = BUILTIN,
    sequences: int = 96,
    length: int = 128,
    seed: int = 0,
    batch_tokens: int = 768,
    skip: int = 0,
) -> Samples:
    """Choose calibration sequences at random, without overlap.

    Of several texts every one gives about its share of the first n sequences, whatever n is:
    calls that take other sequences of the seed's order all have about the same proportions.

    Args:
        model: Its tokenizer turns text into tokens; a model without one uses the calibration
            batches of its workload as they are, and takes no other source.
        source: Texts that ship with Python (``builtin``, ``code``, ``chat``), files, or what the
            model writes (``self``, ``languages``; ZeroQ, Cai et al. 2020, in spirit: no data
            needed), several with weights, as :func:`.mixture.parse_shares` reads them.
        sequences: Number of sequences N; the relative error of a price is about sqrt(2/N).
        length: Tokens per sequence.
        seed: The same seed gives the same sequences.
        batch_tokens: Tokens per batch: more is faster and takes more memory.
        skip: Leave out this many sequences of the seed's order: those another call has taken.

    Raises:
        ValueError: If a text is missing, empty or too short.
    """
    if not model.is_language_model:
        _refuse_text(model, source, "calibration")
        return _from_workload(model, "calibration", seed)
    shares = parse_shares(source) if isinstance(source, str) else tuple(source)
    order = torch.tensor(turns(shares, skip + sequences))
    before, taken = order[:skip], order[skip:]
    drawn: list[Tensor] = []
    for k, share in enumerate(shares):
        first, count = int((before == k).sum()), int((taken == k).sum())
        if count:
            whole = skip + sequences if len(shares) > 1 else None
            drawn.append(_drawn(model, share.source, first, count, length, seed, whole))
    # Stable: the sequences of a text stay in their order.
    ids = torch.empty(sequences, length, dtype=torch.long)
    ids[taken.argsort(stable=True)] = torch.cat(drawn)
    samples = _batched(ids, model, describe_shares(shares), length, seed, batch_tokens)
    if len(shares) == 1:
        return samples
    named = tuple(replace(share, source=Path(share.source).name) for share in shares)
    return replace(samples, texts=named)


def _drawn(
    model: LoadedModel,
    source: str,
    skip: int,
    count: int,
    length: int,
    seed: int,
    whole: int | None,
) -> Tensor:
    """Sequences [count, length] of a text, after others; ``whole`` counts those of the mixture."""
    if source in SAMPLED:
        draw = sampled if whole is None else in_blocks
        return draw(model, source, skip, count, length, seed)
    windows = _windows(model, source, "calibration", length)
    part = "" if whole is None else f" for its share of {whole} sequences"
    _check_enough(windows, source, skip + count, length, part)
    order = np.random.default_rng(seed).permutation(len(windows))[skip : skip + count]
    return windows[torch.from_numpy(order)]


def evaluation_samples(
    model: LoadedModel,
    source: str = BUILTIN,
    tokens: int = 16384,
    length: int = 128,
    batch_tokens: int = 1024,
) -> Samples:
    """Take held-out sequences in reading order from the start of a text.

    Args:
        model: See :func:`calibration_samples`; a workload's ``evaluation`` batches are used.
        source: ``builtin``, ``code`` or ``chat`` (the part that calibration never sees), or a text
            file.
        tokens: Tokens to measure on, rounded down to whole sequences; the whole text if shorter.
        length: Tokens per sequence.
        batch_tokens: Tokens per batch.

    Raises:
        ValueError: If the text is missing, empty or shorter than one sequence.
    """
    if not model.is_language_model:
        _refuse_text(model, source, "evaluation")
        return _from_workload(model, "evaluation", 0)
    windows = _windows(model, source, "evaluation", length)
    _check_enough(windows, source, 1, length)
    return _batched(windows[: max(1, tokens // length)], model, source, length, 0, batch_tokens)


def _windows(model: LoadedModel, source: str, split: Split, length: int) -> Tensor:
    """Consecutive windows of a text as token ids [windows, length]."""
    if length < 2:
        raise ValueError(f"Sequences of {length} tokens are too short; use at least 2.")
    tokenizer = model.workload.tokenizer
    text = read_text(source, split, tokenizer)
    if not text.strip():
        raise ValueError(f"{source} is empty. Give a text of at least {length} tokens.")
    limit = getattr(getattr(model.module, "config", None), "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise ValueError(f"The model reads at most {limit} tokens; --length {length} is too long.")
    prefix = first_tokens(tokenizer)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    check_tokens(model, [*prefix, *ids], f"the text {source}")
    body = length - len(prefix)
    count = len(ids) // body
    windows = torch.tensor(ids[: count * body], dtype=torch.long).reshape(count, body)
    start = torch.tensor(prefix, dtype=torch.long).expand(count, len(prefix))
    return torch.cat([start, windows], dim=1)


def _check_enough(windows: Tensor, source: str, wanted: int, length: int, part: str = "") -> None:
    if len(windows) < wanted:
        weight = "less weight to it, " if part else ""
        raise ValueError(
            f"{source} holds {len(windows)} sequences of {length} tokens, {wanted} are needed{part}"
            f". Give {weight}a longer text, fewer sequences or shorter ones."
        )


def _batched(
    ids: Tensor, model: LoadedModel, source: str, length: int, seed: int, batch_tokens: int
) -> Samples:
    batches = ids.to(model.device).split(max(1, batch_tokens // length))
    return Samples(batches, Path(source).name, length, seed, _hash([ids]))


def _refuse_text(model: LoadedModel, source: str | Sequence[Share], split: Split) -> None:
    if source not in (BUILTIN, MIXTURE):
        option = "--calibration" if split == "calibration" else "the text to measure on (--eval)"
        raise ValueError(
            f"{model.id} brings its own batches and has no tokenizer, so it cannot use {source!r}. "
            f"Leave out {option}, or return bitplan.Workload(model, tokenizer=...)."
        )


def _from_workload(model: LoadedModel, split: Split, seed: int) -> Samples:
    work = model.workload
    held_out = max(1, len(work.calibration) // 4)
    if work.evaluation:
        batches = work.calibration if split == "calibration" else work.evaluation
    elif len(work.calibration) > 1:
        cut = len(work.calibration) - held_out
        batches = work.calibration[:cut] if split == "calibration" else work.calibration[cut:]
    else:
        raise ValueError(
            f"{model.id!r} comes with {len(work.calibration)} calibration batches and no "
            "evaluation batches: too few to calibrate on some and validate on others. Give at "
            "least two batches."
        )
    return samples_from_batches(batches, model, "workload", seed)


def samples_from_batches(
    batches: Sequence[Batch], model: LoadedModel, source: str, seed: int
) -> Samples:
    """Move batches to the model's device and record their hash."""
    moved = tuple(_to(batch, model.device) for batch in batches)
    return Samples(moved, source, None, seed, _hash(moved))


def _to(batch: Batch, device: torch.device) -> Batch:
    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: move(value) for key, value in batch.items()}
    return tuple(move(value) for value in batch)


def _hash(batches: Sequence[Batch]) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        values = batch.values() if isinstance(batch, Mapping) else batch
        for value in [batch] if isinstance(batch, Tensor) else values:
            if isinstance(value, Tensor):
                digest.update(f"{tuple(value.shape)} {value.dtype}".encode())
                digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
