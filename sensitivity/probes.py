"""The one streaming forward + backward pass that every gradient metric reads.

Weights need no gradients. Every unit's module contributes two factors per sample, its input x
and the gradient delta at its output; the weight gradient G = sum_t delta_t x_t^T is formed block
by block while it is consumed and never stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ..models.rendering import Renderer, first_input
from ..models.workload import Batch, LoadedModel, samples_in
from ..quantizers.format import Format
from ..quantizers.store import Rows
from .errors import map_errors

# Gradient with respect to the logits [samples, positions, classes], from the logits themselves.
Upstream = Callable[[Tensor, Batch], Tensor]


@dataclass(frozen=True, slots=True)
class Factors:
    """Per-sample factors of a weight gradient.

    Attributes:
        x: Inputs [samples, positions, channel_groups, cols]; token ids [samples, positions]
            for an embedding.
        delta: Output gradients [samples, positions, channel_groups, rows / channel_groups].
    """

    x: Tensor
    delta: Tensor

    def touched_rows(self) -> Tensor | None:
        """Rows of the weight whose gradient can be non-zero, sorted; None for all of them."""
        return None if self.x.is_floating_point() else self.x.unique()

    def gradient(self, rows: Rows) -> Tensor:
        """Gradient of some rows of the weight, per sample: [samples, rows, cols].

        Rows are a slice, or among the sorted :meth:`touched_rows` of an embedding.
        """
        if isinstance(rows, Tensor):
            return self._lookup_gradient(rows)
        if self.delta.shape[2] == 1:
            return self.delta[:, :, 0, rows].transpose(1, 2) @ self.x[:, :, 0]
        per_group = torch.einsum("npgr,npgc->ngrc", self.delta, self.x)
        return per_group.flatten(1, 2)[:, rows]

    def _lookup_gradient(self, rows: Tensor) -> Tensor:
        where = torch.searchsorted(rows, self.x).clamp_(max=len(rows) - 1)
        sample, position = (rows[where] == self.x).nonzero(as_tuple=True)
        result = self.delta.new_zeros(len(self.x), len(rows), self.delta.shape[-1])
        picked = self.delta[sample, position, 0]
        return result.index_put_((sample, where[sample, position]), picked, accumulate=True)


@dataclass(frozen=True)
class Part:
    """Some rows of one matrix: what a product may look at.

    Attributes:
        factors: Factors of the gradients G_i.
        rows: The rows.
        errors: Rendering errors of all formats [F, rows, cols].
    """

    factors: Factors
    rows: Rows
    errors: Tensor

    @cached_property
    def gradients(self) -> Tensor:
        """Per-sample gradients at the rows [samples, rows * cols]."""
        return self.factors.gradient(self.rows).flatten(1)


Product = Callable[[Part], Tensor]  # [samples, F]; the parts of a matrix are added


def inner(part: Part) -> Tensor:
    """``<G_i, dW_f>``."""
    return part.gradients @ part.errors.flatten(1).T


def squared(part: Part) -> Tensor:
    """``sum G_i^2 dW_f^2``."""
    return part.gradients.square() @ part.errors.flatten(1).square().T


def absolute(part: Part) -> Tensor:
    """``sum |G_i dW_f|``."""
    return part.gradients.abs() @ part.errors.flatten(1).abs().T


def gradient_norm(part: Part) -> Tensor:
    """``||G_i||^2``, the same for all formats: an estimate of the trace of the Fisher matrix."""
    return part.gradients.square().sum(1, keepdim=True).expand(-1, len(part.errors))


def gradient_products(
    factors: Factors,
    renderer: Renderer,
    name: str,
    formats: Sequence[Format],
    products: Sequence[Product],
) -> NDArray[np.float64]:
    """Products of per-sample gradients with the rendering errors of all formats.

    Args:
        factors: Factors of the gradients G_i.
        renderer: Source of the renderings.
        name: Canonical module name.
        formats: The F formats.
        products: The P products, such as :func:`inner`.

    Returns:
        float64 [P, samples, F].
    """

    def work(rows: Rows, errors: Tensor) -> NDArray[np.float64]:
        part = Part(factors, rows, errors)
        return np.stack([product(part).double().cpu().numpy() for product in products])

    parts = map_errors(work, renderer, name, formats, factors.touched_rows())
    return sum(parts, np.zeros((len(products), len(factors.x), len(formats))))


Visitor = Callable[[str, Factors], None]
ForwardHook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Tensor], Tensor]


def stream(
    model: LoadedModel,
    renderer: Renderer,
    batch: Batch,
    *passes: tuple[Upstream, Visitor],
) -> Tensor:
    """One forward pass and a backward pass for every (upstream, visitor).

    Args:
        model: The model; its parameters must not require gradients.
        renderer: Says which modules are units.
        batch: Model inputs.
        *passes: The upstream gives the gradient at the logits, for example p - onehot(y). The
            visitor is called during the backward pass with the canonical module name and its
            factors, last module first. A module used twice, or tied to another, is visited once
            per use; one that does not influence the output is not visited.

    Returns:
        The logits [samples, positions, classes].

    Raises:
        ValueError: If a module's input cannot be told apart by sample, or is overwritten before
            the backward pass.
    """
    samples = samples_in(batch)
    visit: Visitor  # that of the backward pass under way

    def record(name: str, module: nn.Module) -> ForwardHook:
        def hook(
            _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
        ) -> Tensor:
            x = first_input(args, kwargs).detach()
            if len(x) == 1 < samples:  # position ids, shared by all samples
                x = x.expand(samples, *x.shape[1:])
                output = output.expand(samples, *output.shape[1:])
            _check_samples(name, x, samples)
            version = x._version
            if not output.requires_grad:
                # Nothing before this module needs gradients, so the graph starts here; the
                # clone lets a following in-place operation work.
                output = output.detach().requires_grad_().clone()

            def consume(delta: Tensor) -> None:
                if x._version != version:
                    raise ValueError(
                        f"The input of {name!r} is overwritten in place after the layer has used "
                        "it, so the layer's gradient cannot be formed. Write x = x + f(x) for "
                        f"x += f(x) there, or leave it out with --exclude {name!r}."
                    )
                visit(name, _factors(module, x, delta, samples))

            output.register_hook(consume)
            return output

        return hook

    handles = [
        module.register_forward_hook(record(name, module), with_kwargs=True)
        for name, module in renderer.hooked_modules()
    ]
    try:
        with torch.enable_grad():
            logits = model.logits(batch)
            for i, (upstream, chosen) in enumerate(passes, 1):
                visit = chosen
                gradient = upstream(logits.detach(), batch)
                if logits.requires_grad:  # otherwise no unit reaches the output
                    logits.backward(gradient, retain_graph=i < len(passes))
    finally:
        for handle in handles:
            handle.remove()
    return logits.detach()


def check_reached(names: Sequence[str], reached: Iterable[str]) -> None:
    """Raise if the loss did not depend on some matrix in any batch: it has no price.

    Raises:
        ValueError: Names the first such matrix.
    """
    known = set(reached)
    for name in names:
        if name not in known:
            raise ValueError(
                f"{name!r} takes no part in the model's output on the calibration batches, so it "
                f"cannot be priced. Leave it out with --exclude {name!r}, or calibrate on more."
            )


def _check_samples(name: str, x: Tensor, samples: int) -> None:
    lookup_of_positions = x.dim() == 1 and not x.is_floating_point() and len(x) != samples
    if len(x) % samples or len(x) == 0 or lookup_of_positions:
        raise ValueError(
            f"The input of {name!r} has the shape {tuple(x.shape)}: its first dimension does not "
            f"divide into the {samples} samples of the batch, as with routed experts. Leave it "
            f"out with --exclude {name!r}."
        )


def _factors(module: nn.Module, x: Tensor, delta: Tensor, samples: int) -> Factors:
    if isinstance(module, nn.Conv2d):
        delta = delta.flatten(2).unflatten(1, (module.groups, -1)).permute(0, 3, 1, 2)
    else:
        delta = delta.unsqueeze(-2)
    return Factors(
        module_input(module, x, samples), delta.reshape(samples, -1, *delta.shape[-2:]).detach()
    )


def module_input(module: nn.Module, x: Tensor, samples: int) -> Tensor:
    """What multiplies the weight matrix [rows, cols] of a module, per sample.

    Returns:
        [samples, positions, channel_groups, cols]; a Conv2d's input is unfolded to patches, an
        embedding's token ids stay as they are, [samples, positions].
    """
    if isinstance(module, nn.Embedding):
        return x.reshape(samples, -1).contiguous()
    if not isinstance(module, nn.Conv2d):
        return x.reshape(samples, -1, 1, x.shape[-1])
    padding = module.padding
    if isinstance(padding, str):  # "same" or "valid"
        x = F.pad(x, module._reversed_padding_repeated_twice)
        padding = (0, 0)
    patches = F.unfold(
        x,
        (module.kernel_size[0], module.kernel_size[1]),
        (module.dilation[0], module.dilation[1]),
        (int(padding[0]), int(padding[1])),
        (module.stride[0], module.stride[1]),
    )
    patches = patches.unflatten(1, (module.groups, -1)).permute(0, 3, 1, 2)
    result: Tensor = patches.reshape(samples, -1, *patches.shape[-2:])
    return result


def label_upstream(generator: torch.Generator) -> Upstream:
    """p - onehot(y) with y sampled from the model's own softmax at every position.

    The gradient of sum_t -log p(y_t | x_<t); its expectation is zero and its covariance the
    Fisher matrix of the logits, diag(p) - p p^T, independent across positions.
    """

    def upstream(logits: Tensor, _batch: Batch) -> Tensor:
        p = logits.softmax(-1)
        for sample in p:  # one at a time: the cumulative sums are as large as the logits
            cumulative = sample.cumsum(-1)
            uniform = torch.rand((len(sample), 1), generator=generator).to(p.device)
            label = torch.searchsorted(cumulative, uniform * cumulative[:, -1:])
            label.clamp_(max=p.shape[-1] - 1)
            sample.scatter_add_(-1, label, p.new_tensor(-1.0).expand(label.shape))
        return p

    return upstream


def gaussian_upstream(generator: torch.Generator) -> Upstream:
    """r = sqrt(p) * n - p * sum_v sqrt(p_v) n_v with n ~ N(0, I).

    Same covariance diag(p) - p p^T as the label probe, without its heavy tails.
    """

    def upstream(logits: Tensor, _batch: Batch) -> Tensor:
        p = logits.softmax(-1)
        for sample in p:  # one at a time: the noise is as large as the logits
            noise = torch.randn(sample.shape, generator=generator).to(p.device)
            noise.mul_(sample.sqrt())
            sample.mul_(-noise.sum(-1, keepdim=True)).add_(noise)
        return p

    return upstream


def data_upstream(generator: torch.Generator, is_language_model: bool) -> Upstream:
    """p - onehot(y) with y the next token of the text; the last position has no label.

    Models that read no text have no labels in their batches: labels are sampled instead.
    """
    if not is_language_model:
        return label_upstream(generator)

    def upstream(logits: Tensor, batch: Batch) -> Tensor:
        assert isinstance(batch, Tensor)
        p = logits.softmax(-1)
        p[:, -1] = 0
        label = batch[:, 1:].unsqueeze(-1)
        p[:, :-1].scatter_add_(-1, label, p.new_tensor(-1.0).expand(label.shape))
        return p

    return upstream


def positions_in(logits: Tensor) -> int:
    """Positions T per sample of logits [samples, T, classes]."""
    return math.prod(logits.shape[1:-1])
