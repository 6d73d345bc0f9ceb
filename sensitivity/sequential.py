"""A plan's weights rounded once more, each block on the inputs that the rounded ones before give.

Statistics that rounding methods work from come from the original model.  In the quantized one a
matrix multiplies other inputs: those that errors of earlier blocks have changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .._base.memory import Room, memory_of_machine
from .._base.progress import Reporter
from .._base.threads import parallel_map
from ..models.passes import Inputs
from ..models.rendering import Assignment, Renderer
from ..models.samples import Samples
from ..models.units import UnitInfo
from ..models.workload import LoadedModel
from ..quantizers.drift import drift_target
from ..quantizers.methods import METHODS, Evidence, rounding_device
from ..quantizers.packed import PackedTensor
from ..quantizers.store import COPIES
from .curvature import Triangle
from .factors import Factors, Gradient
from .probes import label_upstream
from .reading import whole_pass
from .shared_inputs import cut_again
from .statistics import Statistics

TOKENS = 512  # per pass of a language model, whatever --batch-tokens: sums stay the same
REVISION = 1  # raised when other codes come of the same question

Codes = Mapping[str, PackedTensor]


@dataclass
class _Sums:
    """Sums over inputs of one matrix, as they are in the model at hand.

    Attributes:
        moments: By field of the evidence, ``sum_t u_t y_t y_t^T`` over the inputs y_t.
        shift: Likewise ``sum_t u_t (x_t - y_t) y_t^T``, x_t being the original's; None without.
        seen: Inputs so far.
    """

    moments: dict[str, Triangle]
    shift: dict[str, Tensor] = field(default_factory=dict)
    seen: int = 0


class Sequential:
    """Rounds the matrices of a plan again, in the order in which the model uses them.

    For each block, the calibration sequences are run through the blocks before it as they are
    rounded by now, and its matrices are rounded, in the formats they have, for what they then
    multiply.  A method that works from the curvature (``fisher``) is given

        H = F_s / (1 + a + b) + sum_t (a' |d_t|^2 + b') y_t y_t^T,

    with the inputs y_t of the rounded model, and all else of the original: the gradients d_t,
    those of the statistics again, and F_s, its per-sequence part, which cannot be had for other
    inputs without all gradients; a, b and the damping are those chosen there.  Others get the
    second moments (``hessian``) of y_t.

    Matrices that are not used once for every token, in a product with an input (lookups, routed
    experts, matrices in several places), keep the codes they have, as do formats without codes
    that a method makes.

    Args:
        model: The original model.
        units: Its units.
        renderer: Renders the plan as it was rounded before; it is left as it is.
        assignment: The plan.
        samples: The rounding sequences.
        seed: Seed of the labels.
        drift: Whether matrices are to make up for what their inputs have lost, by
            :func:`.drift.drift_target`; without it little is gained.
        reporter: Where progress is shown.

    Attributes:
        before: The renderer of the plan as it was rounded before.
        renderer: Renders the plan, as far as it is rounded again.

    References:
        Frantar et al. (2023), "GPTQ", section 4.
    """

    def __init__(
        self,
        model: LoadedModel,
        units: Sequence[UnitInfo],
        renderer: Renderer,
        assignment: Assignment,
        samples: Samples,
        *,
        seed: int = 0,
        drift: bool = True,
        reporter: Reporter | None = None,
    ) -> None:
        self.renderer = renderer.overlay()
        self.before, self._assignment, self._drift = renderer, assignment, drift
        self._model, self._units, self._seed = model, units, seed
        cut = samples.of_batches(cut_again(samples, TOKENS))
        self._pass = whole_pass(model, self.renderer, units, cut)
        self._needs = METHODS.trait(renderer.store.rounding, "needs", ())
        self._reporter = reporter or Reporter(quiet=True)
        self._todo: set[str] = set()  # matrices to round
        self._token: dict[str, Tensor] = {}  # |d_t|^2 [samples, positions]
        self._sums: dict[str, _Sums] = {}  # of the block at hand
        self._inputs: dict[str, Tensor] = {}  # of the original, of the batch at hand
        self._scales: dict[str, tuple[float, float]] = {}  # a' and b'

    def run(
        self, done: Codes | None = None, keep: Callable[[Codes], None] = lambda _: None
    ) -> Renderer:
        """Go through the model once.

        Args:
            done: What an interrupted run has rounded.
            keep: Called after every block that was not done, with its new codes.

        Returns:
            :attr:`renderer`.
        """
        done = done or {}
        self._todo = {
            name
            for name, fmt in self._assignment.items()
            if self.before.store.keeps(fmt) and name not in done
        }
        self._todo &= self._used_once()
        if "fisher" in self._needs:
            self._weigh()
        with self._reporter.bar("Rounding again, block by block", len(self._pass.blocks)) as bar:

            def after_block(number: int, names: Sequence[str]) -> Assignment:
                codes = self._round(names)
                for name in names:
                    packed = codes.get(name, done.get(name))
                    if packed is not None:
                        self.renderer.store.put(name, self._assignment[name], packed)
                if codes:
                    keep(codes)
                bar(1)
                return {n: self._assignment[n] for n in names if n in self._assignment}

            self._pass.sequential(
                after_block, self._see, self._see_original if self._drift else None
            )
        return self.renderer

    def _used_once(self) -> set[str]:
        """Matrices that one place uses, as the first batch shows."""
        times: dict[str, int] = {}

        def visit(shown: Inputs) -> None:
            times[shown.name] = times.get(shown.name, 0) + 1

        first = self._pass.samples.of_batches(self._pass.samples.batches[:1])
        whole_pass(self._model, self.before, self._units, first).forward(visit)
        return {name for name, count in times.items() if count == 1}

    def _weigh(self) -> None:
        """Find what every token weighs for every matrix, by gradients of the original model."""
        statistics = self.before.store.evidence
        assert isinstance(statistics, Statistics)
        for _ in statistics.gather([name for name in self._assignment if name in self._todo]):
            pass  # they are there from now on, wherever codes came from
        count = self._pass.samples.count
        times: dict[str, int] = {}

        def visit(name: str, source: Gradient, samples: range) -> None:
            if name not in self._todo or not isinstance(source, Factors):
                return
            if not source.x.is_floating_point() or source.delta.shape[2] != 1:
                return
            power = source.delta[:, :, 0].float().square().sum(-1).cpu()
            kept = self._token.setdefault(name, power.new_zeros(count, power.shape[1]))
            if kept.shape[1] == power.shape[1] and len(power) == len(samples):
                kept[samples.start : samples.stop] = power
                times[name] = times.get(name, 0) + len(samples)

        upstream = label_upstream(torch.Generator().manual_seed(self._seed))
        with self._reporter.bar("Weights of tokens", count) as advance:
            self._pass.backward((upstream, visit), advance=advance)
        self._todo &= {n for n, seen in times.items() if seen == count and statistics.knows(n)}
        self._scales = {name: statistics.per_token(name) for name in self._todo}

    def _see_original(self, shown: Inputs) -> None:
        if shown.name in self._todo:
            self._inputs[shown.name] = shown.x.clone()  # the model may overwrite it

    def _see(self, shown: Inputs) -> None:
        """Add the inputs of a matrix to its sums."""
        name, y = shown.name, shown.x
        original = self._inputs.pop(name, None)
        if name not in self._todo:
            return
        plain = y.is_floating_point() and y.dim() == 4 and y.shape[2] == 1
        token = self._token.get(name)
        known = (
            token is None or token[shown.samples.start : shown.samples.stop].shape == y.shape[:2]
        )
        if not plain or not known or len(y) != len(shown.samples):
            self._todo.discard(name)
            self._sums.pop(name, None)
            return
        cols, device = y.shape[-1], y.device
        sums = self._sums.get(name)
        if sums is None:
            sums = _Sums({need: Triangle(1, cols, device) for need in self._needs})
            if self._drift:
                sums.shift = {need: torch.zeros(cols, cols, device=device) for need in self._needs}
            self._sums[name] = sums
        count = self._pass.samples.count * y.shape[1]
        y = y.flatten(0, 2).float()
        for need in self._needs:
            if need == "fisher":
                a, b = self._scales[name]
                assert token is not None
                power = token[shown.samples.start : shown.samples.stop].flatten().to(device)
                weighted = y * (a * power + b)[:, None]
            else:
                weighted = y / count
            sums.moments[need].add(y[None], weighted[None])
            if original is not None:
                sums.shift[need].addmm_((original.flatten(0, 2).float() - y).T, weighted)
        sums.seen += len(shown.samples)

    def _round(self, names: Sequence[str]) -> dict[str, PackedTensor]:
        """New codes of the matrices of a block."""
        count = self._pass.samples.count
        todo = [name for name in names if name in self._sums and self._sums[name].seen == count]
        device = rounding_device(self.before.store.rounding, self._model.device)
        room = Room(memory_of_machine() // 2)

        def work(name: str) -> PackedTensor:
            with room.take(4 * COPIES * self.before.weight(name).shape[1] ** 2):
                return self._round_one(name, self._sums[name])

        found = list(parallel_map(work, todo, device))
        self._sums.clear()
        return dict(zip(todo, found, strict=True))

    def _round_one(self, name: str, sums: _Sums) -> PackedTensor:
        store, weight = self.before.store, self.before.weight(name)
        evidence = Evidence()
        if "hessian" in self._needs:
            evidence = replace(evidence, hessian=_symmetric(sums.moments["hessian"]))
        if "fisher" in self._needs:
            assert isinstance(store.evidence, Statistics)
            found = store.evidence.with_tokens(name, _symmetric(sums.moments["fisher"]))
            evidence = replace(found, hessian=evidence.hessian)
        if self._drift:
            need = "fisher" if "fisher" in self._needs else "hessian"
            moments = evidence.fisher if need == "fisher" else evidence.hessian
            assert moments is not None
            weight = drift_target(weight.float(), moments, sums.shift[need], evidence.damping)
        return store.round(name, self._assignment[name], weight, evidence)


def _symmetric(sums: Triangle) -> Tensor:
    """[cols, cols]."""
    lower = sums.square()[0].tril()
    return lower.add_(lower.tril(-1).mT)
