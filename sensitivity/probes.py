"""The one streaming forward + backward pass that every gradient metric reads.

A weight that its module multiplies inputs by needs no gradient: two factors per sample, the input
x and the gradient delta at the output, give G = sum_t delta_t x_t^T block by block while it is
consumed.  Any other weight gets its gradient from autograd, one sample at a time, and it is gone
before the next one is made.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..models.passes import Upstream
from ..models.rendering import Renderer, first_input, rows_of
from ..models.sites import Place
from ..models.streamed import read_again
from ..models.workload import Batch, LoadedModel, samples_in
from .factors import DenseGradient, Factors, Gradient
from .uses import Use, check_unchanged, gradients_to, uses_of

Visitor = Callable[[str, Gradient], None]
Hook = Callable[..., Any]


def stream(
    model: LoadedModel,
    renderer: Renderer,
    batch: Batch,
    *passes: tuple[Upstream, Visitor],
    run: Callable[[], Tensor] | None = None,
) -> Tensor:
    """One forward pass and a backward pass for every (upstream, visitor).

    Args:
        model: The model; its parameters must not require gradients.
        renderer: Knows the units.
        batch: Model inputs: a single sample, unless all weights are priced by factors (see
            :meth:`.uses.Uses.pieces`).
        *passes: The upstream gives the gradient at the logits, for example p - onehot(y). The
            visitor is called during the backward pass with the name of a part and its gradient,
            last module first. A module used twice, or tied to another, is visited once
            per use; one that does not influence the output is not visited.
        run: Runs a part of the model instead of all of it; the gradients are those at what it
            gives.

    Returns:
        The logits [samples, positions, classes], or what ``run`` gives.

    Raises:
        ValueError: If a module's input cannot be told apart by sample, or is overwritten before
            the backward pass.
    """
    samples = samples_in(batch)
    uses = uses_of(model, renderer, [batch])
    visit: Visitor  # that of the backward pass under way

    def by_factors(use: Use) -> Hook:
        site, module = use.place.site, use.place.module

        def hook(_module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
            x = first_input(args, kwargs).detach()
            if len(x) == 1 < samples:  # position ids, shared by all samples
                x = x.expand(samples, *x.shape[1:])
                output = output.expand(samples, *output.shape[1:])
            _check_samples(use.matrix, x, samples)
            version = x._version
            if not output.requires_grad:
                # Nothing before this module needs gradients, so the graph starts here; the
                # clone lets a following in-place operation work.
                output = output.detach().requires_grad_().clone()

            def consume(delta: Tensor) -> None:
                check_unchanged(use.matrix, x, version)
                if use.matrix in uses.experts and not delta.any():
                    return  # no token was sent there
                delta = delta if use.scale == 1 else use.scale * delta
                factors = Factors(
                    site.inputs(module, x, samples), site.deltas(module, delta, samples).detach()
                )
                visit(use.matrix, factors)

            output.register_hook(consume)
            return output

        return hook

    def by_autograd(matrix: str, place: Place) -> Hook:
        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            gradient = place.matrix(parameter.grad)
            parameter.grad = None
            for part in renderer.parts_of(matrix):
                some = gradient if part.rows is None else rows_of(gradient, part)
                blocks = 1 if part.rows else place.blocks
                if some.any():
                    visit(part.name, DenseGradient(some, blocks))

        return hook

    handles = [
        use.place.module.register_forward_hook(by_factors(use), with_kwargs=True)
        for use in uses.by_factors
    ]
    wanted = [(place.parameter, by_autograd(m, place)) for m, place in uses.by_autograd.items()]
    try:
        with gradients_to(wanted), read_again(model.module), torch.enable_grad():
            logits = model.logits(batch) if run is None else run()
            for i, (upstream, chosen) in enumerate(passes, 1):
                visit = chosen
                gradient = upstream(logits.detach(), batch)
                if logits.requires_grad:  # otherwise no unit reaches the output
                    logits.backward(gradient, retain_graph=i < len(passes))
    finally:
        for handle in handles:
            handle.remove()
    return logits.detach()


def _check_samples(name: str, x: Tensor, samples: int) -> None:
    if samples == 1:
        return
    lookup_of_positions = x.dim() == 1 and not x.is_floating_point() and len(x) != samples
    if len(x) % samples or len(x) == 0 or lookup_of_positions:
        raise ValueError(
            f"The input of {name!r} has the shape {tuple(x.shape)}: its first dimension does not "
            f"divide into the {samples} samples of the batch, as with routed experts. Leave it "
            f"out with --exclude {name!r}."
        )


def kl_upstream(log_p: Tensor) -> Upstream:
    """q - p: the gradient of ``sum_t KL(p_t || q_t)`` at the logits of q.

    Args:
        log_p: Log-probabilities of the original on the same batch [samples, positions, classes].
    """

    def upstream(logits: Tensor, _batch: Batch) -> Tensor:
        return logits.softmax(-1).sub_(log_p.exp())

    return upstream


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
