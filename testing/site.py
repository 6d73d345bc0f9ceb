"""What every site promises: a weight that is found, read, priced, swapped and packed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..models.find import find_units
from ..models.packing import replace
from ..models.rendering import Renderer
from ..models.samples import samples_from_batches
from ..models.sites import FALLBACK, SITES, Place, Site, places, site_of
from ..models.units import UnitInfo
from ..models.workload import LoadedModel, samples_in, take
from ..quantizers.format import Format
from ..sensitivity.factors import Factors
from ..sensitivity.metrics import METRICS, Task
from ..sensitivity.probes import label_upstream
from .contract import Contract
from .toys import drawn

LAYER_TYPES = {"linear", "embedding", "convolution", "recurrent", "experts", "other"}
FORMATS = ("int2-g32-asym", "int4-gc", "fp32")
TOLERANCE = 2e-5  # of packed models' logits, relative to the largest


class SiteContract(Contract):
    """Of a model that the subclass gives, the weights that the site takes.

    A subclass overrides :meth:`toy`.
    """

    def toy(self, name: str) -> LoadedModel:
        """A small model with weights of this site that all reach the logits, and some batches.

        See :func:`.toys.toy_of`, which gives a module seeded weights.
        """
        raise NotImplementedError(
            f"Give {type(self).__name__} a method toy(self, name) that returns a model."
        )

    @pytest.fixture
    def model(self, name: str) -> LoadedModel:
        """The toy."""
        return self.toy(name)

    @pytest.fixture
    def units(self, model: LoadedModel, name: str) -> tuple[UnitInfo, ...]:
        """The units of the toy that are the site's."""
        own = {place.name for place in places(model.module) if place.site_name == name}
        return tuple(u for u in find_units(model.module) if own >= {p.module for p in u.parts})

    @pytest.fixture
    def own(self, model: LoadedModel, name: str) -> list[Place]:
        """The places of the toy that are the site's."""
        return [place for place in places(model.module) if place.site_name == name]

    def plugin(self, name: str) -> Site:
        """The site."""
        return SITES.get(name)

    def test_finds_its_weights(
        self, name: str, model: LoadedModel, own: list[Place], units: tuple[UnitInfo, ...]
    ) -> None:
        """Every one is a unit, and no other site takes it."""
        assert units
        assert self.plugin(name).layer_type in LAYER_TYPES
        planned = {alias for unit in units for alias in unit.aliases}
        planned |= {part.module for unit in units for part in unit.parts}
        assert planned >= {place.name for place in own}
        for place in own:
            takers = [
                other
                for other in set(SITES.names()) - {FALLBACK}
                if SITES.get(other).takes(place.module, place.attribute, place.parameter)
            ]
            assert takers == [name] or (name == FALLBACK and not takers)
            assert site_of(place.module, place.attribute, place.parameter) == name

    def test_the_matrix_is_the_weight(self, name: str, own: list[Place]) -> None:
        """Every entry once, and back again; leading indices are blocks of rows where it says so."""
        for place in own:
            numbered = torch.arange(place.parameter.numel()).float().view(place.parameter.shape)
            matrix = place.matrix(numbered)
            assert matrix.shape == place.shape
            assert torch.equal(matrix.flatten().sort().values, numbered.flatten())
            assert torch.equal(place.restored(matrix), numbered)
            assert torch.equal(place.matrix(place.restored(matrix)), matrix)
            if place.site.by_index:
                block = len(matrix) // len(numbered)
                for i in (0, len(numbered) - 1):
                    found = place.site.restored(
                        place.module,
                        place.attribute,
                        matrix[i * block : (i + 1) * block],
                        torch.Size((1, *numbered.shape[1:])),
                    )
                    assert torch.equal(found, numbered[i : i + 1])

    def test_gradients_are_those_of_autograd(
        self, name: str, model: LoadedModel, units: tuple[UnitInfo, ...]
    ) -> None:
        """A Fisher probe's scores, one sample at a time with every parameter's own gradient."""
        renderer = Renderer(model.module, units)
        formats = [Format.parse(spec) for spec in FORMATS]
        batches = model.workload.calibration
        samples = samples_from_batches(batches, model, "toy", 0)
        task = Task(model, units, formats, renderer, samples, 0, lambda _: None)
        scores = METRICS.get("fisher_probe")(task).values
        upstream = label_upstream(torch.Generator().manual_seed(0))
        expected = []
        for batch in batches:
            for i in range(samples_in(batch)):
                sample = take(batch, i, i + 1)
                with requiring_gradients(renderer) as parameters:
                    logits = model.logits(sample)
                    gradient = upstream(logits.detach(), sample)
                    found = torch.autograd.grad(
                        logits, list(parameters.values()), gradient, allow_unused=True
                    )
                products: dict[str, Tensor | None] = dict(zip(parameters, found, strict=True))
                row = [self._products(renderer, unit, formats, products) for unit in units]
                expected.append(np.stack(row) / np.sqrt(2 * logits.shape[1]))
        size = np.abs(expected).max(axis=(0, 2), keepdims=True)
        assert (size > 0).all()
        np.testing.assert_allclose(scores / size, np.stack(expected) / size, atol=2e-4)

    def test_factors_multiply_to_the_gradient(
        self, name: str, model: LoadedModel, own: list[Place]
    ) -> None:
        """Where a site gives factors, of every call; else prices would silently come the slow way.

        Whole batches: the factors of a sample are those of its own inputs.
        """
        for place in own:
            scale = place.site.scale(place.module)
            if scale is None:
                continue
            for x, output in calls(model, place):
                samples, weight = len(x), place.parameter
                delta = drawn(output.shape, 9)
                with torch.enable_grad():
                    weight.requires_grad_(True)
                    per_sample = [
                        torch.autograd.grad(place.module(x[i : i + 1]), weight, delta[i : i + 1])[0]
                        for i in range(samples)
                    ]
                    weight.requires_grad_(False)
                factors = Factors(
                    place.site.inputs(place.module, x, samples),
                    scale * place.site.deltas(place.module, delta, samples),
                )
                rows = factors.touched_rows()
                found = factors.gradient(slice(None) if rows is None else rows)
                for gradient, expected in zip(found, per_sample, strict=True):
                    matrix = place.matrix(expected)
                    given = matrix if rows is None else matrix[rows]
                    torch.testing.assert_close(gradient, given, rtol=1e-4, atol=1e-5)
                    assert matrix.count_nonzero() == given.count_nonzero()

    def _products(
        self,
        renderer: Renderer,
        unit: UnitInfo,
        formats: list[Format],
        gradients: dict[str, Tensor | None],
    ) -> NDArray[np.float64]:
        total = np.zeros(len(formats))
        for part in unit.parts:
            gradient = gradients[part.name]
            if gradient is None:  # an expert that this sample does not reach
                continue
            matrix = renderer.place(part.name).matrix(gradient).double()
            for f, fmt in enumerate(formats):
                error = renderer.render(part.name, fmt) - renderer.weight(part.name)
                total[f] += float((matrix * error).sum())
        return total

    def test_another_weight_is_read_and_the_original_comes_back(
        self, name: str, model: LoadedModel, units: tuple[UnitInfo, ...]
    ) -> None:
        """Unit by unit: the same logits as with the parameter itself overwritten."""
        renderer, fmt = Renderer(model.module, units), Format.parse("int2-g32-asym")
        classes = [type(module) for module in model.module.modules()]
        before = logits(model)
        for unit in units:
            with renderer.applied(dict.fromkeys(unit.modules, fmt)):
                swapped = logits(model)
            scale = before.abs().max()
            assert (swapped - before).abs().max() > 1e-4 * scale
            overwritten = LoadedModel(
                model.id, deepcopy(model.module), model.source_dtype, model.workload
            )
            targets = {place.name: place for place in places(overwritten.module)}
            for part in unit.parts:
                place = targets[part.module]
                place.parameter.data.copy_(place.restored(renderer.render(part.name, fmt)))
            torch.testing.assert_close(
                swapped, logits(overwritten), rtol=0, atol=TOLERANCE * float(scale)
            )
            assert torch.equal(logits(model), before)
        assert [type(module) for module in model.module.modules()] == classes
        assert not any(p.requires_grad for p in model.module.parameters())

    def test_a_packed_model_is_its_dequantized_one(
        self, name: str, model: LoadedModel, units: tuple[UnitInfo, ...]
    ) -> None:
        """All units at once, in two formats in turn; nothing of the original weight is left."""
        renderer = Renderer(model.module, units)
        formats = [Format.parse(spec) for spec in FORMATS[:2]]
        assignment = {
            part.name: formats[i % 2] for i, unit in enumerate(units) for part in unit.parts
        }
        with renderer.applied(assignment):
            expected = logits(model)
        packed = {part: renderer.store.packed(part, fmt) for part, fmt in assignment.items()}
        rows = {p.name: p.rows for unit in units for p in unit.parts if p.rows is not None}
        aliases = {alias: unit.parts[0].module for unit in units for alias in unit.aliases}
        places_before = {place.name for place in places(model.module)}
        replace(model.module, packed, aliases, rows)
        scale = float(expected.abs().max())
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=TOLERANCE * scale)
        left = {place.name for place in places(model.module)}
        taken = {part.module for unit in units for part in unit.parts} | set(aliases)
        assert left == places_before - taken
        stored = [part for tensor in packed.values() for part in tensor.tensors.values()]
        kept = {t.data_ptr() for t in model.module.state_dict().values()}
        assert all(part.data_ptr() in kept for part in stored)


@contextmanager
def requiring_gradients(renderer: Renderer) -> Iterator[dict[str, Tensor]]:
    """The parameters of all parts, which require gradients within the block."""
    parameters = {name: renderer.place(name).parameter for name in renderer.names}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    try:
        yield dict(parameters)
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(False)


@torch.no_grad()
def calls(model: LoadedModel, place: Place) -> list[tuple[Tensor, Tensor]]:
    """Input and output of every call of a place's module on the first batch."""
    seen: list[tuple[Tensor, Tensor]] = []
    hook = place.module.register_forward_hook(
        lambda _module, args, out: seen.append((args[0], out))
    )
    try:
        model.logits(model.workload.calibration[0])
    finally:
        hook.remove()
    return seen


@torch.no_grad()
def logits(model: LoadedModel) -> Tensor:
    """The logits of all batches, one after the other."""
    found = [model.logits(batch).flatten() for batch in model.workload.calibration]
    return torch.cat(found)
