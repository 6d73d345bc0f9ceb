"""How a model uses its weights, found out by running it: what a gradient can be made of.

The gradient of a weight that one module multiplies its input by is a product of two factors, which
price many formats in one pass over a batch.  Whether that is so is not read off a class but seen:
on one sample, the product must equal what autograd gives.  A weight that its parent reads, one
that is used in several ways, or a module with code of its own fails this, and is priced through
autograd, one sample at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..models.rendering import Renderer, first_input
from ..models.sites import Place
from ..models.sites.experts import expert_of
from ..models.streamed import read_again
from ..models.units import UnitInfo
from ..models.workload import Batch, LoadedModel, samples_in, take
from .factors import Factors

_TOKENS = 16  # of a text: enough to see how a model uses its weights
_TRIALS = 8  # samples before a weight without a gradient is said to have none
_TOLERANCE = 1e-3  # relative difference of two gradients, or inputs, that are the same


@dataclass(frozen=True, slots=True)
class Use:
    """A module whose calls give the factors of a weight's gradient.

    Attributes:
        matrix: The weight's name.
        place: The module and its parameter.
        scale: The gradient is this multiple of the factors' product.
    """

    matrix: str
    place: Place
    scale: float


@dataclass(frozen=True, slots=True)
class Uses:
    """Where the gradients of the weights come from.

    Attributes:
        by_factors: The modules of weights that are products.
        by_autograd: All other weights: name -> place.
        experts: Names of parts that only some inputs reach.
        singly: Whether samples must be run one at a time: a weight is priced through autograd, or
            the inputs of a module do not divide by sample.
        compared: Whether samples were seen together, as is needed to say that.
    """

    by_factors: Sequence[Use]
    by_autograd: Mapping[str, Place]
    experts: frozenset[str]
    singly: bool
    compared: bool = True

    def pieces(self, batches: Sequence[Batch]) -> Iterator[Batch]:
        """The batches as they can be run."""
        for batch in batches:
            count = samples_in(batch)
            if self.singly and count > 1:
                yield from (take(batch, i, i + 1) for i in range(count))
            else:
                yield batch


_known: WeakKeyDictionary[Renderer, Uses] = WeakKeyDictionary()


def uses_of(model: LoadedModel, renderer: Renderer, batches: Sequence[Batch]) -> Uses:
    """How the model uses the weights of the units; found out once per renderer.

    Args:
        model: The original model.
        renderer: Knows the units.
        batches: Calibration batches, of which a few samples are run.

    Raises:
        ValueError: If a weight has no part in the output.
    """
    known = _known.get(renderer)
    if known is None:
        known = _known[renderer] = _find(model, renderer, batches)
    elif not known.compared and _pair(batches) is not None:
        singly = known.singly or not _divides(model, known.by_factors, batches)
        known = _known[renderer] = replace(known, singly=singly, compared=True)
    return known


def check_unchanged(name: str, x: Tensor, version: int) -> None:
    """Raise if a module's input is no longer what the module saw.

    Raises:
        ValueError: Names the module.
    """
    if x._version != version:
        raise ValueError(
            f"The input of {name!r} is overwritten in place after the layer has used it, so the "
            "layer's gradient cannot be formed. Write x = x + f(x) for x += f(x) there, or leave "
            f"it out with --exclude {name!r}."
        )


def refuse_unreached(names: Sequence[str]) -> None:
    """Raise because the output does not depend on some weights: they have no price.

    Raises:
        ValueError: Names the first, and how to leave all of them out.
    """
    others = f" The same holds for {len(names) - 1} more." if len(names) > 1 else ""
    flags = " ".join(f"--exclude {name!r}" for name in names[:8])
    raise ValueError(
        f"{names[0]!r} takes no part in the model's output on the calibration batches, so it "
        f"cannot be priced.{others} Leave it out with {flags}, or calibrate on more."
    )


def idle_units(
    model: LoadedModel, units: Sequence[UnitInfo], batches: Sequence[Batch]
) -> tuple[UnitInfo, ...]:
    """Units that the output on some samples does not depend on, such as a tower for images.

    Experts are none of them: which ones a token reaches is found out on all samples.

    Args:
        model: The original model.
        units: Its units.
        batches: Calibration batches, of which a few samples are run.
    """
    renderer = Renderer(model.module, units)
    experts = _experts(model, renderer)
    first = _short(model, take(batches[0], 0, 1))
    reached, _ = _Trial(model, renderer, ()).run(first)
    idle = set(_unreached(model, renderer, batches, reached, experts))
    return tuple(unit for unit in units if idle.issuperset(part.module for part in unit.parts))


def _experts(model: LoadedModel, renderer: Renderer) -> frozenset[str]:
    return frozenset(
        part.name
        for matrix, used in renderer.places()
        for part in renderer.parts_of(matrix)
        if used[0].site.stacked or expert_of(used[0].path, model.module)
    )


def _find(model: LoadedModel, renderer: Renderer, batches: Sequence[Batch]) -> Uses:
    experts = _experts(model, renderer)
    candidates = list(_candidates(renderer))
    first = _short(model, take(batches[0], 0, 1))
    reached, products = _Trial(model, renderer, candidates).run(first)
    if missing := _unreached(model, renderer, batches, reached, experts):
        refuse_unreached(missing)
    uses = [use for use in candidates if use.matrix in products]
    autograd = {name: used[0] for name, used in renderer.places() if name not in products}
    singly = bool(autograd) or not _divides(model, uses, batches)
    singly = singly or not experts.isdisjoint(renderer.names)
    return Uses(uses, autograd, experts, singly, compared=_pair(batches) is not None)


def _candidates(renderer: Renderer) -> Iterator[Use]:
    """Weights that are whole, and whose modules all seem to multiply by them."""
    for matrix, used in renderer.places():
        parts = renderer.parts_of(matrix)
        if len(parts) > 1 or parts[0].rows is not None:
            continue
        distinct = {id(place.module): place for place in used}.values()
        scales = [place.site.scale(place.module) for place in distinct]
        for place, scale in zip(distinct, scales, strict=True):
            if scale is not None and None not in scales:
                yield Use(matrix, place, scale)


class _Trial:
    """One forward and backward pass of one sample, with gradients made both ways."""

    def __init__(self, model: LoadedModel, renderer: Renderer, candidates: Sequence[Use]) -> None:
        self.model = model
        self.places = {name: used[0] for name, used in renderer.places()}
        self.candidates = candidates
        self.plain = {use.matrix for use in candidates}
        self.found: dict[str, Tensor] = {}  # by factors
        self.reached: set[str] = set()
        self.products: set[str] = set()

    def run(self, sample: Batch) -> tuple[set[str], set[str]]:
        """Names of the weights with a gradient, and of those whose factors give it."""
        handles: list[Any] = []
        for use in self.candidates:
            hook = self._hook(use)
            handles.append(use.place.module.register_forward_hook(hook, with_kwargs=True))
        hooks = [(place.parameter, self._compare(name)) for name, place in self.places.items()]
        generator = torch.Generator().manual_seed(0)
        try:
            with gradients_to(hooks), read_again(self.model.module), torch.enable_grad():
                logits = self.model.logits(sample)
                direction = torch.randn(logits.shape, generator=generator).to(logits.device)
                if logits.requires_grad:
                    logits.backward(direction)
        finally:
            for handle in handles:
                handle.remove()
        # Of what this sample does not use, the modules' code is all there is to go by.
        return self.reached, self.products | (self.plain - self.reached)

    def _hook(self, use: Use) -> Any:
        site, module = use.place.site, use.place.module

        def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            x = first_input(args, kwargs).detach()
            version = x._version
            if isinstance(output, Tensor) and output.requires_grad:

                def consume(delta: Tensor) -> None:
                    check_unchanged(use.matrix, x, version)
                    inputs, deltas = site.inputs(module, x, 1), site.deltas(module, delta, 1)
                    factors = Factors(inputs, deltas.detach())
                    rows = factors.touched_rows()
                    gradient = factors.gradient(slice(None) if rows is None else rows)[0]
                    if rows is not None:
                        whole = torch.zeros(use.place.shape, device=delta.device)
                        gradient = whole.index_add_(0, rows, gradient)
                    before = self.found.get(use.matrix, 0)
                    self.found[use.matrix] = before + use.scale * gradient

                output.register_hook(consume)

        return hook

    def _compare(self, name: str) -> Any:
        place = self.places[name]

        def compare(parameter: Tensor) -> None:
            assert parameter.grad is not None
            exact = place.matrix(parameter.grad)
            found = self.found.pop(name, None)
            parameter.grad = None
            size = _largest(exact)  # squares of the smallest gradients would vanish
            if size == 0:
                return
            self.reached.add(name)
            if name not in self.plain or found is None:
                return
            skipped = getattr(place.module, "padding_idx", None) if place.site.lookups else None
            if skipped is not None:
                exact[skipped] = found[skipped] = 0  # torch gives it no gradient, though it acts
            if _largest(found.sub_(exact)) <= _TOLERANCE * size:
                self.products.add(name)

        return compare


@contextmanager
def gradients_to(hooks: Sequence[tuple[Tensor, Callable[[Tensor], None]]]) -> Iterator[None]:
    """Let parameters get gradients inside the block, each handed to its hook when complete."""
    handles: list[Any] = []
    try:
        for parameter, hook in hooks:
            parameter.requires_grad_(True)
            handles.append(parameter.register_post_accumulate_grad_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, _ in hooks:
            parameter.requires_grad_(False)
            parameter.grad = None


def _largest(values: Tensor) -> Tensor:
    largest: Tensor = torch.linalg.vector_norm(values, ord=math.inf)
    return largest


def _unreached(
    model: LoadedModel,
    renderer: Renderer,
    batches: Sequence[Batch],
    reached: set[str],
    experts: frozenset[str],
) -> list[str]:
    """Weights without a gradient, on more samples too, found out before the long pass."""
    places = {name: used[0] for name, used in renderer.places()}
    rare = {renderer.parts[name].module for name in experts}
    missing = {name: place for name, place in places.items() if name not in reached | rare}
    samples = [(batch, i) for batch in batches for i in range(samples_in(batch))][1:]
    for batch, i in samples[:: max(1, len(samples) // _TRIALS)]:
        if not missing:
            break
        seen = _Trial(model, renderer, ())
        seen.places = missing
        found, _ = seen.run(take(batch, i, i + 1))
        missing = {name: place for name, place in missing.items() if name not in found}
    return list(missing)


def _divides(model: LoadedModel, uses: Sequence[Use], batches: Sequence[Batch]) -> bool:
    """Whether two samples together give every module the inputs that they give it alone."""
    pair = _pair(batches)
    if pair is None:
        return True
    try:
        alone = [_inputs(model, uses, _short(model, take(pair, i, i + 1))) for i in (0, 1)]
        together = _inputs(model, uses, _short(model, take(pair, 0, 2)))
    except Exception:  # whatever a model does with a part of a batch
        return False
    for module, both in together.items():
        first, second = (inputs.get(module, []) for inputs in alone)
        if not len(first) == len(second) == len(both):
            return False
        if not all(map(_same_inputs, first, second, both)):
            return False
    return True


def _pair(batches: Sequence[Batch]) -> Batch | None:
    """A batch of two samples or more."""
    return next((batch for batch in batches if samples_in(batch) > 1), None)


def _same_inputs(first: Tensor, second: Tensor, both: Tensor) -> bool:
    if len(both) == 1:  # position ids, shared by all samples
        return torch.equal(first, both) and torch.equal(second, both)
    if not len(both) == 2 * len(first) == 2 * len(second):
        return False
    size = max(float(both.abs().max()), 1e-30)
    return all(
        found.shape == alone.shape and float((found - alone).abs().max()) <= _TOLERANCE * size
        for found, alone in zip(both.split(len(first)), (first, second), strict=True)
    )


def _inputs(
    model: LoadedModel, uses: Sequence[Use], sample: Batch
) -> dict[nn.Module, list[Tensor]]:
    """What every module is called with, call by call."""
    found: dict[nn.Module, list[Tensor]] = {}

    def record(module: nn.Module, args: Any, kwargs: Any) -> None:
        found.setdefault(module, []).append(first_input(args, kwargs).detach().clone())

    handles = [use.place.module.register_forward_pre_hook(record, with_kwargs=True) for use in uses]
    try:
        with torch.no_grad():
            model.logits(sample)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _short(model: LoadedModel, batch: Batch) -> Batch:
    """The first tokens of a language model's text; other inputs whole."""
    if model.is_language_model and isinstance(batch, Tensor):
        return batch[:, :_TOKENS]
    return batch
