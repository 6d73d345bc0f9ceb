"""What the KV cache costs at every width, for a goal that plans it."""

from __future__ import annotations

import hashlib

from ...models.kv_cache import KV_BITS, price_kv
from ...search.kv import KVTable
from ..context import Context, Stage

SAMPLES = 8  # sequences the cache is priced on: 3 passes per layer


def cache(context: Context) -> None:
    """Price the cache of every layer, or take the prices that are there."""
    goal, reporter = context.goal, context.reporter
    samples = context.work.samples.first(SAMPLES)
    model = context.table.provenance.model.sha256
    digest = hashlib.sha256(f"{model} {samples.sha256} {samples.count}".encode()).hexdigest()
    path = context.folder.kv(digest[:12])
    if path.exists():
        reporter.say(f"KV cache prices found in {path}, not measured again")
        goal.cache = KVTable.load(path)
        return
    layers = len(goal.cache.layers) if goal.cache else 0
    passes = len(samples.batches) * (1 + layers * (len(KV_BITS) - 1))
    with reporter.bar("Pricing the KV cache", passes) as advance:
        found = price_kv(context.work.model, samples, KV_BITS, lambda: advance(1))
    goal.cache = KVTable(found.layers, found.bits, found.bytes_per_token, found.kl, found.stderr)
    goal.cache.save(path)


def _has_widths(context: Context) -> bool:
    return context.goal.cache is not None and context.goal.cache.is_planned


STAGE = Stage("kv cache", cache, _has_widths)
