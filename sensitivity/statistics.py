"""The Fisher statistics that rounding methods work from, gathered once and kept in files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from .._base.files import write_json
from .._base.memory import give_back
from .._base.progress import Advance, Reporter
from ..models.blockwise import BlockwisePass
from ..models.rendering import Renderer
from ..models.samples import Samples
from ..models.sites import Place
from ..models.units import UnitInfo, module_kinds
from ..models.whole import WholePass
from ..models.workload import Batch, LoadedModel, take
from ..quantizers.methods import METHODS, Evidence, rounding_device
from .curvature import Sums, Triangle, entries
from .factors import DenseGradient, Factors, Gradient
from .kept_sums import Kept
from .mixture import GRID, UNTESTED, Mixture, Trial, choose
from .probes import label_upstream, positions_in
from .reading import passes_for
from .shared_inputs import cut_again, in_rounds, shared_inputs
from .uses import Uses, uses_of

LIMIT = 5 << 28  # bytes of sums at a time
TOKENS = 256  # per pass of a language model, whatever --batch-tokens
TRIALS = 3  # matrices of a kind to choose its mixture on, spread over the model
REVISION = 2  # raised when other sums or mixtures come of the same sequences


@dataclass(frozen=True, slots=True)
class _Shared:
    """Matrices whose sums are gathered together, as their inputs are the same.

    Attributes:
        rows: Their names, with the rows of each.
        shape: (parts, cols) of the sums.
        factors: Whether gradients are products with the inputs.
        folds: How many parts of the sequences have sums of their own.
    """

    rows: Mapping[str, int]
    shape: tuple[int, int]
    factors: bool
    folds: int

    @property
    def nbytes(self) -> int:
        """Bytes of all sums."""
        parts, cols = self.shape
        squares = 2 * len(self.rows) + 1 if self.factors else len(self.rows)
        return 4 * self.folds * squares * parts * entries(cols)

    def zeros(self, device: torch.device) -> dict[str, list[Sums]]:
        """By name, nothing summed yet for every fold."""
        found: dict[str, list[Sums]] = {name: [] for name in self.rows}
        for _ in range(self.folds):
            parts, cols = self.shape
            plain = Triangle(parts, cols, device) if self.factors else None
            for name, rows in self.rows.items():
                found[name].append(Sums.zeros(rows, parts, cols, device, plain))
        return found


class Statistics:
    """Gathers what errors cost, by a forward and a backward pass with labels that are sampled.

    The sums of every matrix are kept in a file, from which its evidence is made each time it is
    asked for.  How they are mixed and damped is chosen for every kind of matrix by
    cross-validation, see :func:`.mixture.choose`, and kept there, too.

    A matrix of which rows are only looked up has no evidence, nor has one that nothing reaches; of
    one that is looked up and multiplied by (a tied embedding) the products alone count.  Uses of
    one matrix in several places are taken to be independent.

    Args:
        model: The original model.
        units: Its units.
        renderer: Renders them; says for which method.
        samples: Makes the rounding sequences.
        key: What the sums depend on, as a hash.
        seed: Seed of the labels.
        folder: Where files are kept; None for a temporary folder.
        reporter: Where progress is shown.
        limit: Most bytes of sums at a time; those of a single input may exceed it.

    References:
        Martens (2020), "New insights and perspectives on the natural gradient method"; Kim et al.
        (2025), "GuidedQuant", for sums with weights per token; Tseng et al. (2025),
        "Model-Preserving Adaptive Rounding", for those of whole sequences.
    """

    def __init__(
        self,
        model: LoadedModel,
        units: Sequence[UnitInfo],
        renderer: Renderer,
        samples: Callable[[], Samples],
        key: str,
        *,
        seed: int = 0,
        folder: Path | None = None,
        reporter: Reporter | None = None,
        limit: int = LIMIT,
    ) -> None:
        self._model, self._renderer, self._samples = model, renderer, samples
        self._units = units
        self._seed, self._limit = seed, limit
        self._reporter = reporter or Reporter(quiet=True)
        self._kinds = {
            name: kind
            for unit in units
            for name, kind in zip(unit.modules, module_kinds(unit), strict=True)
        }
        self._products = {
            name: not all(place.site.lookups for place in places)
            for matrix, places in renderer.places()
            for name in (part.name for part in renderer.parts_of(matrix))
        }
        self._sums_key = hashlib.sha256(f"{key}\n{seed}\n{REVISION}".encode()).hexdigest()
        self._folder = folder
        self._temporary: TemporaryDirectory[str] | None = None
        chosen_by = f"{json.dumps(self._sampled)}\n{GRID}"
        self.key = hashlib.sha256(f"{self._sums_key}\n{chosen_by}".encode()).hexdigest()

    @property
    def chosen(self) -> dict[str, Any]:
        """Mixture and damping of every kind of matrix, as far as they were chosen."""
        return {kind: mixture.to_json() for kind, mixture in self._known_mixtures().items()}

    def gather(self, names: Sequence[str]) -> Iterator[Mapping[str, Evidence]]:
        """The evidence on matrices, by name, made as it is asked for.

        Raises:
            ValueError: If a gradient has NaN or Inf.
        """
        known = [name for name in names if self._products[name]]
        open_kinds = {self._kinds[name] for name in known} - self._known_mixtures().keys()
        sampled = [name for kind in sorted(open_kinds) for name in self._sampled[kind]]
        wanted = dict.fromkeys([*known, *sampled])
        missing = [name for name in wanted if self._kept.folds(name) < self._folds(name)]
        if missing:
            self._pass(missing)
        if open_kinds:
            self._choose(sorted(open_kinds))
        reached = {name for name in known if self._kept.reached(name)}
        if rest := [name for name in names if name not in reached]:
            self._reporter.say(
                f"{len(rest)} of {len(names)} matrices have no curvature (looked up, or not "
                f"reached) and are rounded to nearest: {rest[0]}"
                + (f", {rest[1]}, ..." if len(rest) > 2 else "")
            )
        yield _Made({name: name in reached for name in names}, self._made)

    def knows(self, name: str) -> bool:
        """Whether the sums of a matrix are there, and any gradient reached it."""
        return self._products.get(name, False) and self._kept.reached(name)

    def per_token(self, name: str) -> tuple[float, float]:
        """See :meth:`.mixture.Mixture.per_token`, of a matrix whose gradients have factors."""
        return self._mixture(name).per_token(self._kept.read(name, torch.device("cpu")))

    def with_tokens(self, name: str, tokens: Tensor) -> Evidence:
        """The evidence on a matrix with the per-token part of its curvature replaced.

        Args:
            name: The matrix.
            tokens: ``sum_t (a |d_t|^2 + b) x_t x_t^T`` [cols, cols] with a, b of :meth:`per_token`
                and the gradients of the model's own labels.
        """
        return self._mixture(name).with_tokens(self._kept.read(name, tokens.device), tokens)

    def cost(self, name: str, error: Tensor) -> float:
        """What an error of a matrix [rows, cols] costs by its sums, in nats per token."""
        fold = self._kept.read(name, error.device)
        blocks = error.unflatten(0, (len(fold.forms["sequence"]), -1))
        rows = ((blocks @ fold.fisher()) * blocks).sum(-1).flatten()
        return float(rows.double() @ fold.relative_rows().double()) / 2

    def _made(self, name: str) -> Evidence:
        """The evidence on a matrix, from its file."""
        fold = self._kept.read(name, self._renderer.weight(name).device)
        needs = METHODS.trait(self._renderer.store.rounding, "needs", ())
        return self._mixture(name).evidence(fold, fold.hessian() if "hessian" in needs else None)

    def _mixture(self, name: str) -> Mixture:
        return self._known_mixtures().get(self._kinds[name], UNTESTED)

    @cached_property
    def _sampled(self) -> dict[str, list[str]]:
        """The matrices of every kind that its mixture is chosen on."""
        members: dict[str, list[str]] = {}
        for name, kind in self._kinds.items():
            if self._products[name]:
                members.setdefault(kind, []).append(name)
        found = {}
        for kind, some in members.items():
            count = min(TRIALS, len(some))
            found[kind] = [some[(2 * i + 1) * len(some) // (2 * count)] for i in range(count)]
        return found

    def _folds(self, name: str) -> int:
        return 2 if name in self._sampled[self._kinds[name]] else 1

    @cached_property
    def _kept(self) -> Kept:
        if self._folder is None:
            self._temporary = TemporaryDirectory(prefix="bitplan-")
        folder = self._folder or Path(self._temporary.name if self._temporary else "")
        return Kept(folder / self._sums_key[:16])

    def _pass(self, names: Sequence[str]) -> None:
        """Gather and keep the sums of matrices, as many at a time as there is room for."""
        batches = cut_again(self._samples(), TOKENS)
        uses = uses_of(self._model, self._renderer, batches)
        samples = self._samples().of_batches(batches)
        passes = passes_for(self._model, self._renderer, self._units, samples)
        together: dict[int, list[_Shared]] = {}  # by the block after which they are complete
        owners = _owners(passes)
        for one in self._shared(names, uses, batches):
            together.setdefault(min(owners.get(n, 0) for n in one.rows), []).append(one)
        rounds: list[list[_Shared]] = []
        for some in together.values():
            for i, those in enumerate(in_rounds(some, self._limit, lambda one: one.nbytes)):
                if i == len(rounds):
                    rounds.append([])
                rounds[i].extend(those)
        for i, some in enumerate(rounds, 1):
            which = f" {i} of {len(rounds)}" if len(rounds) > 1 else ""
            with self._reporter.bar(f"Curvature of the KL{which}", samples.count) as advance:
                self._sum(some, passes, owners, advance)

    def _shared(self, names: Sequence[str], uses: Uses, batches: Sequence[Batch]) -> list[_Shared]:
        wanted, places = set(names), dict[str, list[Place]]()
        for use in uses.by_factors:
            for part in self._renderer.parts_of(use.matrix):
                if part.name in wanted and not use.place.site.lookups:
                    places.setdefault(part.name, []).append(use.place)
        rows = {name: self._renderer.parts[name].shape[0] for name in names}
        found = [
            _Shared(
                {n: rows[n] for n in one.names}, one.shape, True, max(map(self._folds, one.names))
            )
            for one in shared_inputs(self._model, self._renderer, places, take(batches[0], 0, 1))
        ]
        for name in names:
            if name not in places:
                part = self._renderer.parts[name]
                parts = 1 if part.rows else self._renderer.place(name).blocks
                shape = (parts, part.shape[1])
                found.append(_Shared({name: rows[name]}, shape, False, self._folds(name)))
        return found

    def _sum(
        self,
        shared: Sequence[_Shared],
        passes: WholePass[Gradient],
        owners: Mapping[str, int],
        advance: Advance,
    ) -> None:
        """Sums of some matrices in one pass, written as soon as they are complete."""
        group = {name: one for one in shared for name in one.rows}
        first = {next(iter(one.rows)) for one in shared}  # these add to the plain sums
        sums: dict[str, list[Sums]] = {}
        written: set[str] = set()
        tokens = [0, 0]  # of the sequences of either fold
        seen, here = 0, max(owners.values(), default=0)

        def visit(name: str, source: Gradient, samples: range) -> None:
            nonlocal here
            owner = owners.get(name, 0)
            if owner < here and name not in passes.shared:  # the blocks above are done
                write([n for n in sums if owners.get(n, 0) > owner])
                here = owner
            if name in group and name not in sums:
                sums.update(group[name].zeros(self._model.device))
            folds, start = sums.get(name, []), samples.start
            if isinstance(source, DenseGradient) and folds:
                folds[fold_of(start) % len(folds)].add_dense(source)
            elif isinstance(source, Factors) and source.x.is_floating_point():
                for i, fold in enumerate(folds):
                    some = [j for j in range(source.samples) if fold_of(start + j) == i]
                    fold.add(source, some if len(folds) > 1 else slice(None), plain=name in first)

        def write(names: Sequence[str]) -> None:
            for name in names:
                folds = sums.pop(name)
                written.add(name)
                self._kept.write(name, tokens if len(folds) > 1 else [sum(tokens)], folds)
            give_back()

        def upstream(logits: Tensor, batch: Batch) -> Tensor:
            nonlocal seen
            for _ in range(len(logits)):
                tokens[fold_of(seen)] += positions_in(logits)
                seen += 1
            return labels(logits, batch)

        labels = label_upstream(torch.Generator().manual_seed(self._seed))
        passes.backward((upstream, visit), advance=advance)
        write(list(sums))
        for one in shared:  # what nothing has reached
            if rest := [name for name in one.rows if name not in written]:
                sums |= one.zeros(self._model.device)
                write(rest)
                sums.clear()

    def _choose(self, kinds: Sequence[str]) -> None:
        """Choose and keep the mixtures of kinds of matrices."""
        rounding = self._renderer.store.rounding
        device = rounding_device(rounding, self._model.device)
        mixtures = dict(self._known_mixtures())
        with self._reporter.bar("Choosing mixtures of the curvature", len(kinds)) as advance:
            for kind in kinds:
                trials = []
                for name in self._sampled[kind]:
                    first, second = (self._kept.read(name, device, fold) for fold in (0, 1))
                    trials.append(Trial.of(self._renderer.weight(name).to(device), (first, second)))
                mixtures[kind] = choose([t for t in trials if t is not None], rounding)
                advance(1)
        found = {kind: mixture.to_json() for kind, mixture in mixtures.items()}
        write_json(self._mixtures_path, found)

    def _known_mixtures(self) -> dict[str, Mixture]:
        try:
            found = json.loads(self._mixtures_path.read_text(encoding="utf-8"))
            return {kind: Mixture(**fields) for kind, fields in found.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    @property
    def _mixtures_path(self) -> Path:
        rounding = self._renderer.store.rounding
        parts = (self.key, rounding, str(METHODS.trait(rounding, "revision", 1)))
        digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
        return self._kept.folder / f"mixtures-{digest[:12]}.json"


def _owners(passes: WholePass[Gradient]) -> dict[str, int]:
    """The block after which a backward pass is done with a matrix, by name; 0 batch by batch."""
    if not isinstance(passes, BlockwisePass) or not passes.is_blockwise:
        return {}
    return {name: max(i, 1) for i, names in enumerate(passes.blocks) for name in names}


def fold_of(number: int) -> int:
    """Which half a sequence belongs to: 0 or 1, as in the sequence of Thue and Morse.

    Texts of a mixture take turns: by odd and even numbers one of two texts would be all of a half,
    and what was chosen by rounding for one text what does well on the other.

    >>> [fold_of(number) for number in range(8)]
    [0, 1, 1, 0, 1, 0, 0, 1]
    """
    return number.bit_count() % 2


class _Made(Mapping[str, Evidence]):
    """Evidence by name, made each time it is asked for."""

    def __init__(self, reached: Mapping[str, bool], make: Callable[[str], Evidence]) -> None:
        self._reached, self._make = reached, make

    def __getitem__(self, name: str) -> Evidence:
        return self._make(name) if self._reached[name] else Evidence()

    def __iter__(self) -> Iterator[str]:
        return iter(self._reached)

    def __len__(self) -> int:
        return len(self._reached)
