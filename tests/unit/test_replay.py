"""The coarsened KL against its formula, and reuse of prefixes against full passes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bitplan.models.find import find_units
from bitplan.models.measure import measure, plan_runner
from bitplan.models.rendering import Assignment, Renderer
from bitplan.models.replay import Replay
from bitplan.models.samples import Samples, calibration_samples, samples_from_batches
from bitplan.models.topk import TopK
from bitplan.models.workload import LoadedModel, Workload, samples_in
from bitplan.quantizers.format import Format

COARSE, FINE = (Format.parse(name) for name in ("int3-g32-asym", "int6-g32"))
BLOCKS, WIDTH, CLASSES, SAMPLES = 6, 32, 10, 7


class Block(nn.Module):
    """A residual block that counts the sequences it sees; variants of how models write one."""

    def __init__(self, variant: str) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.variant = variant
        self.seen = 0

    def forward(self, hidden: Tensor) -> Any:
        self.seen += len(hidden)
        change = self.down(self.up(hidden).tanh())
        if self.variant == "in_place":
            return hidden.add_(change)
        if self.variant == "tuple":
            return hidden + change, "extra"
        if self.variant == "dict":
            return {"hidden": hidden + change}
        return hidden + change


class Net(nn.Module):
    def __init__(self, variant: str = "plain") -> None:
        super().__init__()
        self.embed = nn.Linear(8, WIDTH)
        self.layers = nn.ModuleList(Block(variant) for _ in range(BLOCKS))
        self.head = nn.Linear(WIDTH, CLASSES)
        self.variant = variant

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        hidden = self.embed(x if scale is None else x * scale[:, None, None])
        middle = hidden
        for i, block in enumerate(self.layers):
            output = block(hidden)
            if self.variant == "tuple":
                output, _extra = output
            hidden = output["hidden"] if self.variant == "dict" else output
            if self.variant == "skip" and i == 2:
                middle = hidden
        if self.variant == "twice":
            hidden = self.layers[0](hidden)
        logits: Tensor = self.head(hidden + middle if self.variant == "skip" else hidden)
        return logits


def net(variant: str = "plain") -> tuple[LoadedModel, Samples]:
    """A stack of blocks with samples in batches of 3, 3 and 1, each of 5 positions."""
    torch.manual_seed(0)
    module = Net(variant).requires_grad_(False).eval()
    model = LoadedModel("net", module, "float32", Workload(module))
    inputs = torch.randn(SAMPLES, 5, 8)
    return model, samples_from_batches(inputs.split(3), model, "toy", 0)


def replay_of(model: LoadedModel, samples: Samples, **options: int) -> Replay:
    units = find_units(model.module)
    return Replay(model, Renderer(model.module, units), units, samples, **options)


def plans(names: Sequence[str], count: int, seed: int = 0) -> list[dict[str, Format]]:
    """Children of the plan that is coarse everywhere, each finer in one or two matrices."""
    rng = np.random.default_rng(seed)
    parent = dict.fromkeys(names, COARSE)
    changes = [rng.choice(names, size=rng.integers(1, 3), replace=False) for _ in range(count)]
    return [parent, *(parent | dict.fromkeys(map(str, change), FINE) for change in changes)]


def names_of(model: LoadedModel) -> list[str]:
    return Renderer(model.module, find_units(model.module)).names


def exact(
    model: LoadedModel, samples: Samples, assignments: Sequence[Assignment]
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Full KL [plans, samples] of full passes, in float64."""
    renderer = Renderer(model.module, find_units(model.module))
    result = []
    with torch.no_grad():
        for assignment in assignments:
            run = plan_runner(model, renderer, assignment)
            pairs = [
                (model.logits(batch).double(), run(batch).double()) for batch in samples.batches
            ]
            p, q = (torch.cat(logits).log_softmax(-1) for logits in zip(*pairs, strict=True))
            result.append((p.exp() * (p - q)).sum(-1).mean(1).numpy())
    return np.stack(result)


def seen(model: LoadedModel) -> list[int]:
    return [block.seen for block in model.module.layers]  # type: ignore[union-attr]


def lives_on(model: LoadedModel) -> Iterator[str]:
    """Blocks whose forward pass is still replaced."""
    return (name for name, module in model.module.named_modules() if "forward" in vars(module))


@pytest.mark.parametrize("scale", [1.0, 8.0, 40.0])
def test_coarsened_kl_is_its_formula_and_a_lower_bound(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    first = scale * torch.randn(3, 300, 20, generator=generator)
    second = first + torch.randn(3, 300, 20, generator=generator)
    p, q = (x.double().softmax(-1).numpy() for x in (first, second))
    order = np.argsort(-p, -1)
    p, q = (np.take_along_axis(x, order, -1) for x in (p, q))
    before = np.zeros(3)
    for k in (1, 4, 19, 20, 50):
        a, b = (
            np.concatenate(
                [x[..., :k], x[..., k:].sum(-1, keepdims=True)[..., : x.shape[-1] - k]], -1
            )
            for x in (p, q)
        )
        found = TopK.of(first, k).kl(second).numpy()
        np.testing.assert_allclose(found, (a * np.log(a / b)).sum(-1).mean(1), rtol=1e-6)
        assert (found > before).all(), "finer outcomes have more KL"
        before = 0.999999 * found
    assert TopK.of(first, 4).kl(first).abs().max() == 0


def test_all_classes_give_the_exact_kl_and_few_come_close(tiny: LoadedModel) -> None:
    samples = calibration_samples(tiny, sequences=5, length=24, batch_tokens=48)
    assignments = plans(names_of(tiny), 2)
    renderer = Renderer(tiny.module, find_units(tiny.module))
    runs = {str(i): plan_runner(tiny, renderer, plan) for i, plan in enumerate(assignments)}
    measured, _ = measure(tiny, runs, samples)
    full = np.stack([measured[name].kl for name in runs])
    found = replay_of(tiny, samples, top_k=512).kl(assignments, range(5))
    np.testing.assert_allclose(found, full, rtol=1e-4)
    for k, share in ((64, 0.8), (256, 0.97)):
        bound = replay_of(tiny, samples, top_k=k).kl(assignments, range(5))
        assert (bound < full).all()
        assert (bound.mean(1) > share * full.mean(1)).all()


def test_reuse_changes_nothing_on_a_language_model(tiny: LoadedModel) -> None:
    samples = calibration_samples(tiny, sequences=5, length=24, batch_tokens=48)
    assignments = plans(names_of(tiny), 8)
    replay, plain = (replay_of(tiny, samples, cache_bytes=size) for size in (1 << 30, 0))
    found = replay.kl(assignments, range(5))
    np.testing.assert_array_equal(found, plain.kl(assignments, range(5)))
    assert replay.blocks_saved > 0 == plain.blocks_saved
    assert replay.blocks_run + replay.blocks_saved == plain.blocks_run == 9 * 2 * 5
    handle = tiny.module.get_submodule("lm_head").register_forward_pre_hook(interrupt)
    with pytest.raises(RuntimeError, match="interrupted"):
        replay.kl(assignments[1:2], range(5))
    handle.remove()
    assert not list(lives_on(tiny)), "the model's own forward passes are put back"
    np.testing.assert_array_equal(replay.kl(assignments, range(5)), found)


def interrupt(*_: object) -> None:
    raise RuntimeError("interrupted")


@pytest.mark.parametrize("variant", ["plain", "tuple", "in_place", "skip", "twice", "dict"])
def test_every_way_to_write_a_block_gives_the_same_kl(variant: str) -> None:
    model, samples = net(variant)
    assignments = plans(names_of(model), 12)
    full = exact(model, samples, assignments)
    replay = replay_of(model, samples)
    for _ in range(2):  # again from the states of the first call
        found = replay.kl(assignments, range(SAMPLES))
        np.testing.assert_allclose(found, full, rtol=1e-4)
    reusable = variant in {"plain", "tuple", "in_place"}
    assert (replay.blocks_saved > 0) == reusable
    assert not list(lives_on(model))


def test_every_shared_prefix_runs_once_per_call() -> None:
    model, samples = net()
    assignments = plans(names_of(model), 20, seed=1)
    replay = replay_of(model, samples)
    before = seen(model)
    replay.kl(assignments, range(SAMPLES))
    assert replay.kl([], range(SAMPLES)).shape == (0, SAMPLES)
    prefixes = []
    for block in range(1, BLOCKS + 1):
        inside = [f"layers.{i}.{matrix}" for i in range(block) for matrix in ("up", "down")]
        prefixes.append({tuple(a[name].name for name in ("embed", *inside)) for a in assignments})
    runs = [after - b for after, b in zip(seen(model), before, strict=True)]
    assert runs == [(1 + len(p)) * SAMPLES for p in prefixes], "1 for the original"
    assert replay.blocks_run == sum(len(p) for p in prefixes) * SAMPLES
    assert replay.blocks_saved == 21 * BLOCKS * SAMPLES - replay.blocks_run


@pytest.mark.parametrize(
    ("change", "saved"),
    [("embed", 0), ("layers.0.down", 0), ("layers.4.up", 4), ("head", BLOCKS)],
)
def test_a_change_reruns_what_comes_after_it(change: str, saved: int) -> None:
    model, samples = net()
    replay = replay_of(model, samples)
    parent = dict.fromkeys(names_of(model), COARSE)
    replay.kl([parent], range(SAMPLES))
    replay.kl([parent | {change: FINE}], range(SAMPLES))
    assert replay.blocks_saved == saved * SAMPLES


def test_rejected_and_accepted_proposals_keep_the_next_start() -> None:
    model, samples = net()
    replay = replay_of(model, samples)
    parent = dict.fromkeys(names_of(model), COARSE)
    saved = []
    steps: list[Mapping[str, Format]] = [
        parent,
        parent | {"layers.1.up": FINE},
        child := parent | {"layers.4.up": FINE},
        child | {"layers.5.up": FINE},
    ]
    for step in steps:
        before = replay.blocks_saved
        replay.kl([step], range(3))
        saved.append((replay.blocks_saved - before) // 3)
    assert saved == [0, 1, 4, 5]


@pytest.mark.parametrize("share", [0, 0.03, 0.2, 0.5, 1, 2])
def test_memory_is_bounded_and_thinner_states_give_the_same_kl(share: float) -> None:
    model, samples = net()
    assignments = plans(names_of(model), 6)
    plain = replay_of(model, samples, cache_bytes=0)
    whole = SAMPLES * BLOCKS * 5 * WIDTH * 4  # states of one plan on all sequences
    bound = int(share * whole)
    replay = replay_of(model, samples, cache_bytes=bound)
    for sequences in (range(SAMPLES), range(2, 6), range(SAMPLES)):
        found = replay.kl(assignments, sequences)
        np.testing.assert_array_equal(found, plain.kl(assignments, sequences))
        assert replay.cached_bytes <= bound
    assert (replay.cached_bytes > 0) == (share > 0.1), "one state of a batch of 3 is 1/14"
    assert (replay.blocks_saved > 0) == (share > 0.1)


def test_more_memory_saves_more() -> None:
    model, samples = net()
    assignments = plans(names_of(model), 10)
    saved = []
    for bound in (1_000, 4_000, 8_000, 16_000, 1 << 20):
        replay = replay_of(model, samples, cache_bytes=bound)
        replay.kl(assignments, range(SAMPLES))
        saved.append(replay.blocks_saved)
    assert saved == sorted(saved)
    assert 0 == saved[0] < saved[2] < saved[-1]


def test_sequences_count_through_the_batches_and_any_part_may_be_asked_for() -> None:
    model, samples = net()
    assignments = plans(names_of(model), 3)
    full = exact(model, samples, assignments)
    replay = replay_of(model, samples)
    for sequences in (range(2, 4), range(0), range(1), range(5, 7), range(SAMPLES), range(4, 7)):
        found = replay.kl(assignments, sequences)
        expected = full[:, sequences.start : sequences.stop]
        np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("kind", ["tuple", "dict"])
def test_batches_of_several_inputs(kind: str) -> None:
    model, samples = net()
    scales = torch.linspace(0.5, 2, SAMPLES)
    batches = []
    for batch in samples.batches:
        assert isinstance(batch, Tensor)
        scale, scales = scales[: samples_in(batch)], scales[samples_in(batch) :]
        batches.append((batch, scale) if kind == "tuple" else {"x": batch, "scale": scale})
    samples = samples_from_batches(batches, model, "toy", 0)
    assignments = plans(names_of(model), 3)
    found = replay_of(model, samples).kl(assignments, range(2, 5))
    np.testing.assert_allclose(found, exact(model, samples, assignments)[:, 2:5], rtol=1e-4)


def test_convolutional_network_with_few_classes() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 4, 3),
        nn.Flatten(),
        nn.Linear(64, 5),
    )
    module.requires_grad_(False).eval()
    model = LoadedModel("cnn", module, "float32", Workload(module))
    inputs = torch.randn(6, 3, 8, 8)
    samples = samples_from_batches(inputs.split(4), model, "toy", 0)
    assignments = plans(names_of(model), 3)
    replay = replay_of(model, samples, top_k=256)
    found = replay.kl(assignments, range(6))
    np.testing.assert_allclose(found, exact(model, samples, assignments), rtol=1e-4)
    assert replay.blocks_saved == replay.blocks_run == 0, "it has no repeated blocks"
    for few in (1, 3):
        assert (replay_of(model, samples, top_k=few).kl(assignments, range(6)) < found).all()


def test_a_plan_may_leave_matrices_original() -> None:
    model, samples = net()
    replay = replay_of(model, samples)
    found = replay.kl([{}, {"layers.3.up": COARSE}], range(SAMPLES))
    assert np.abs(found[0]).max() < 1e-7 < found[1].min()


def test_errors_say_what_is_wrong() -> None:
    model, samples = net()
    with pytest.raises(ValueError, match="top_k is 0"):
        replay_of(model, samples, top_k=0)
    replay = replay_of(model, samples)
    for wrong in (range(6, 8), range(0, 4, 2), range(-1, 2)):
        with pytest.raises(ValueError, match="7 sequences"):
            replay.kl([{}], wrong)
    with pytest.raises(ValueError, match=r"'layers\.9\.up', which is no matrix.*'embed'"):
        replay.kl([{"layers.9.up": COARSE}], range(1))
