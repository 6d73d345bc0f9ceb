"""Find a model's folds by running it: what a norm or a linear layer feeds, by whatever name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .._base.progress import Reporter
from .folds import Fold, multiply
from .rendering import first_input
from .sites import Place, places
from .sites.experts import expert_of
from .workload import Batch, LoadedModel, take

TOKENS = 16  # of the one sequence that is traced
SPREAD = 1.0  # trial scales lie between 2^-SPREAD and 2^SPREAD
TOLERANCE = 1e-4  # of the largest entry: float32 rounding through all layers stays below
_MULTIPLIED = ("linear", "experts", "generic")  # sites whose matrices may multiply their input


class _Stopped(Exception):
    """A trial has failed: something else is fed."""


@torch.no_grad()
def find_folds(model: LoadedModel, batch: Batch, reporter: Reporter | None = None) -> list[Fold]:
    """The places of a model where a scale per channel can go, each tried by itself.

    A trial divides a source's output by scales, runs the model, and multiplies the columns of every
    matrix when it is found to read a divided input. It holds if nothing else has changed on the
    way, and the logits are what they were.  Norms are tried first: any module with one weight per
    channel (and a bias) that it multiplies by.  Then linear layers, with the next one whose input
    no norm explains, as ``up_proj`` and ``down_proj``, or ``v_proj`` and ``o_proj``.

    The experts of a list share what any of them reads; between the matrices of an expert there are
    no folds.

    Args:
        model: The model, unchanged afterwards.
        batch: Inputs; one sample is run, of a language model the first 16 tokens.
        reporter: Where progress is shown.
    """
    return _Tracer(model, batch).folds(reporter or Reporter(quiet=True))


class _Tracer:
    """The model's run on one sample, and trials on it."""

    def __init__(self, model: LoadedModel, batch: Batch) -> None:
        self.model = model
        sample = take(batch, 0, 1)
        text = model.is_language_model and isinstance(sample, Tensor)
        self.sample = sample[:, :TOKENS] if text and isinstance(sample, Tensor) else sample
        every = places(model.module)
        uses = Counter(id(place.parameter) for place in every)
        self.places: dict[nn.Module, list[Place]] = {}
        self.experts: dict[tuple[str, str], list[Place]] = {}
        for place in every:
            if place.site_name in _MULTIPLIED and not place.site.lookups:
                self.places.setdefault(place.module, []).append(place)
                if expert := expert_of(place.path, model.module):
                    self.experts.setdefault((expert[0], place.attribute), []).append(place)
        self.shared = {id(p.parameter) for p in every if uses[id(p.parameter)] > 1}
        self.calls: list[tuple[nn.Module, Tensor]] = []
        self.logits = self._run(lambda module, x: self.calls.append((module, x.clone())))

    def folds(self, reporter: Reporter) -> list[Fold]:
        """All folds that hold."""
        found: list[Fold] = []
        norms = list(self._norms())
        with reporter.bar("Trying folds into norms", len(norms)) as advance:
            for name, norm, offset in norms:
                fold = self._tried(name, norm, offset)
                found += [fold] if fold else []
                advance(1)
        explained = {name for fold in found for name in fold.matrices}
        targets = self._targets(explained)
        with reporter.bar("Trying folds into linear layers", len(targets)) as advance:
            for target, sources in targets:
                for source in sources:
                    fold = self._tried(source.path, source.module, None)
                    if fold and target.name in fold.matrices:
                        found.append(fold)
                        break
                advance(1)
        return found

    def _run(self, visit: Callable[[nn.Module, Tensor], None]) -> Tensor:
        def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = next(iter((*args, *kwargs.values())), None)
            if isinstance(x, Tensor) and x.is_floating_point():
                visit(module, first_input(args, kwargs))

        handles = [m.register_forward_pre_hook(watch, with_kwargs=True) for m in self.places]
        try:
            return self.model.logits(self.sample)
        finally:
            for handle in handles:
                handle.remove()

    def _norms(self) -> Iterator[tuple[str, nn.Module, float]]:
        for name, module in self.model.module.named_modules():
            offset = _norm_offset(module)
            if offset is not None:
                yield name, module, offset

    def _targets(self, explained: set[str]) -> list[tuple[Place, list[Place]]]:
        """Linear layers whose input no norm explains, and those that may feed each, nearest first.

        These are the ones that have run since the last such layer.
        """
        counts = Counter(id(module) for module, _ in self.calls)
        found, before = [], list[Place]()
        for place in (place for module, _ in self.calls for place in self.places[module]):
            if (
                place.site_name != "linear"
                or expert_of(place.path, self.model.module)
                or counts[id(place.module)] > 1
                or id(place.parameter) in self.shared
            ):
                continue
            if place.name not in explained:
                fitting = [one for one in before if place.shape[1] % one.shape[0] == 0]
                found.append((place, fitting[::-1]))
                before = []
            before.append(place)
        return found

    def _tried(self, name: str, source: nn.Module, offset: float | None) -> Fold | None:
        """The fold of a source, if there is one."""
        weight = source._parameters["weight"]
        assert weight is not None
        own = next((place for place in self.places.get(source, ())), None)
        channels = len(weight) if own is None else own.shape[0]
        order = torch.randperm(channels, generator=torch.Generator().manual_seed(0))
        scale = torch.exp2(torch.linspace(-SPREAD, SPREAD, channels)[order])
        trial = _Trial(self, scale)
        try:
            for parameter in source._parameters.values():
                if parameter is not None:
                    trial.keep(parameter)
            if own is None:
                shift = float(offset or 0)
                weight.copy_((weight.cpu() + shift) / scale - shift)
            else:
                multiply(own, 1 / scale[:, None])
            if (bias := source._parameters.get("bias")) is not None:
                bias.copy_(bias.cpu() / scale)
            logits = self._run(trial.visit)
        except _Stopped:
            return None
        except ValueError:  # NaN or Inf
            return None
        finally:
            trial.undo()
        if not trial.scaled or not _equal(logits, self.logits):
            return None
        columns = () if trial.plain else tuple(trial.columns.tolist())
        return Fold(name, tuple(trial.scaled), channels, columns, offset)


class _Trial:
    """One run in which a source's output is divided: what reads it is found and made up for."""

    def __init__(self, tracer: _Tracer, scale: Tensor) -> None:
        self.tracer, self.scale = tracer, scale
        self.scaled: dict[str, Place] = {}
        self.columns = torch.empty(0, dtype=torch.long)
        self.kept: list[tuple[nn.Parameter, Tensor]] = []
        self.call = 0

    @property
    def plain(self) -> bool:
        """Whether every column is the channel of its number."""
        return torch.equal(self.columns, torch.arange(len(self.scale)))

    def keep(self, parameter: nn.Parameter) -> None:
        """Remember a parameter that is about to change."""
        self.kept.append((parameter, parameter.detach().clone()))

    def undo(self) -> None:
        """Give all parameters what they had."""
        for parameter, before in self.kept:
            parameter.copy_(before)

    def visit(self, module: nn.Module, x: Tensor) -> None:
        """See one input."""
        calls = self.tracer.calls
        if self.call >= len(calls) or calls[self.call][0] is not module:
            raise _Stopped
        before = calls[self.call][1]
        self.call += 1
        done = any(place.name in self.scaled for place in self.tracer.places[module])
        if x.shape == before.shape and _equal(x, before):
            if done:
                raise _Stopped  # its matrices are multiplied for another input
            return
        columns = _channels(x, before, self.scale)
        if columns is None or (len(self.columns) and not torch.equal(columns, self.columns)):
            raise _Stopped
        self.columns = columns
        if not done:
            self._multiply(module)

    def _multiply(self, module: nn.Module) -> None:
        cols = len(self.columns)
        reading = [place for place in self.tracer.places[module] if place.shape[1] == cols]
        if not reading:
            raise _Stopped
        model = self.tracer.model.module
        for place in reading:
            expert = expert_of(place.path, model)
            alike = self.tracer.experts[expert[0], place.attribute] if expert else []
            for one in (place, *(other for other in alike if other is not place)):
                if id(one.parameter) in self.tracer.shared or one.shape[1] != cols:
                    raise _Stopped
                self.keep(one.parameter)
                multiply(one, self.scale[self.columns])
                self.scaled[one.name] = one


def _equal(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= TOLERANCE * b.abs().max()) if a.numel() else True


def _channels(x: Tensor, before: Tensor, scale: Tensor) -> Tensor | None:
    """Which channel's scale divides every column of an input; None if it is not divided by any."""
    count, cols = len(scale), before.shape[-1]
    if x.shape != before.shape or cols % count or not x.numel():
        return None
    x, before = (part.reshape(-1, cols).float().cpu() for part in (x, before))
    if cols == count and _equal(x * scale, before):
        return torch.arange(count)
    largest = before.abs().argmax(0, keepdim=True)
    ratio = (before.gather(0, largest) / x.gather(0, largest))[0]
    ordered, order = scale.sort()
    middles = (ordered[1:] * ordered[:-1]).sqrt()
    columns = order[torch.bucketize(ratio.nan_to_num(1), middles)]
    return columns if _equal(x * scale[columns], before) else None


@torch.no_grad()
def _norm_offset(module: nn.Module) -> float | None:
    """What a norm adds to its weight, 0 or 1; None for what multiplies no channel by a weight."""
    own = {name: p for name, p in module._parameters.items() if p is not None}
    weight = own.get("weight")
    known = own.keys() <= {"weight", "bias"} and next(module.children(), None) is None
    if weight is None or not known or any(p.dim() != 1 for p in own.values()):
        return None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, len(weight), generator=generator).to(weight)
    bias = {"bias": torch.zeros_like(weight)} if "bias" in own else {}
    try:
        zero, one = (
            functional_call(module, {"weight": torch.full_like(weight, value), **bias}, (x,))
            for value in (0.0, 1.0)
        )
    except Exception:  # whatever a module's own code does with inputs it was not made for
        return None
    if not isinstance(zero, Tensor) or not isinstance(one, Tensor) or zero.shape != x.shape:
        return None
    return next((k for k in (0.0, 1.0) if _equal(zero, k * (one - zero)) and one.any()), None)


def within(folds: Sequence[Fold], planned: set[str]) -> tuple[list[Fold], list[Fold]]:
    """Folds that change no matrix but planned ones, and the others."""
    inside = [
        fold
        for fold in folds
        if {*fold.matrices, *([fold.source] if fold.offset is None else [])} <= planned
    ]
    return inside, [fold for fold in folds if fold not in inside]
