"""What every export target promises: what is written is the plan, or nothing is."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from bitplan.exporters.checks import violations
from bitplan.exporters.export import export
from bitplan.exporters.source import Source, open_source
from bitplan.exporters.targets import EXPORTERS, Exporter, find, shown_name
from bitplan.exporters.verify import weight_error
from bitplan.models.workload import LoadedModel
from bitplan.quantizers.format import Format
from bitplan.quantizers.packed import PackedTensor
from bitplan.quantizers.runtimes import Rules, byte_count
from bitplan.search.plan import Plan
from bitplan.tests.plans import hand_made, mixed

NAMES = EXPORTERS.names()
CHECKPOINTS = [
    (name, runtime)
    for name in NAMES
    if EXPORTERS.get(name).form
    for runtime in EXPORTERS.get(name).runtimes
]
CONFIGS = [name for name in NAMES if EXPORTERS.get(name).config_suffix]


def target(name: str) -> Exporter:
    exporter = EXPORTERS.get(name)()
    for module in exporter.needs:
        if find_spec(module) is None:
            pytest.skip(f"needs {module}")
    return exporter


def out_path(folder: Path, exporter: Exporter) -> Path:
    return folder / f"out{exporter.suffix}"


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("name", "runtime"), CHECKPOINTS)
def test_a_written_checkpoint_is_the_plan(
    name: str, runtime: str, wide: LoadedModel, wide_gguf: Path, tmp_path: Path
) -> None:
    exporter = target(name)
    plan = mixed(wide, Rules.load(runtime))
    out = out_path(tmp_path, exporter)
    done = export(plan, name, out, runtime=runtime, like=wide_gguf, model=wide)
    assert leftovers(tmp_path) == [out.name]
    formats = done.source.formats
    shapes = done.source.shapes
    found = {stored.name: stored for stored in exporter.read(out, wide)}
    for unit, fmt in formats.items():
        if not fmt.floating:
            assert found[unit].fmt == fmt
            assert found[unit].shape == shapes[unit]
            assert found[unit].nbytes == byte_count(runtime)(fmt, shapes[unit])
    assert not any(not s.fmt.floating for n, s in found.items() if n not in formats)
    assert (
        len({fmt.name for fmt in formats.values()}) > 1 or len(Rules.load(runtime).candidates) < 3
    )
    assert weight_error(exporter, done.source, out) <= exporter.max_weight_error
    again = out_path(tmp_path / "again", exporter)
    export(plan, name, again, runtime=runtime, like=wide_gguf, model=wide)
    assert contents(again) == contents(out)


def contents(path: Path) -> list[tuple[str, bytes]]:
    files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    return sorted((str(p.relative_to(path)), p.read_bytes()) for p in files)


def another_width(rules: Rules, fmt: Format) -> Format | None:
    """A format of the runtime with another number of bits, if it has one."""
    integers = [f for f in rules.all_formats() if not f.floating]
    return next((f for f in integers if f.bits != fmt.bits), None)


def tampered(source: Source, name: str, packed: PackedTensor) -> Source:
    original = source.packed
    return replace(source, packed=lambda asked: packed if asked == name else original(asked))


@pytest.mark.parametrize(("name", "runtime"), CHECKPOINTS)
def test_a_wrong_width_and_swapped_scales_are_noticed(
    name: str,
    runtime: str,
    wide: LoadedModel,
    wide_gguf: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exporter = target(name)
    plan = mixed(wide, Rules.load(runtime))
    source = open_source(plan, model=wide, like=wide_gguf)
    victim, fmt = next((n, f) for n, f in source.formats.items() if not f.floating)
    right = source.packed(victim)
    # The rows of the scales change places; the codes stay.
    wrong = PackedTensor(
        fmt, right.shape, {k: v if k == "codes" else v.flip(0) for k, v in right.tensors.items()}
    )
    out = out_path(tmp_path, exporter)
    monkeypatch.setattr(
        "bitplan.exporters.export.open_source", lambda *_, **__: tampered(source, victim, wrong)
    )
    export(plan, name, out, runtime=runtime, like=wide_gguf, model=wide)
    with pytest.raises(ValueError, match=victim):
        weight_error(exporter, source, out)

    other = another_width(Rules.load(runtime), fmt)
    if other is None:
        return
    wide_one = open_source(
        hand_made(wide, plan.assignments | {victim: other.name}), model=wide, like=wide_gguf
    ).packed(victim)
    monkeypatch.setattr(
        "bitplan.exporters.export.open_source", lambda *_, **__: tampered(source, victim, wide_one)
    )
    second = out_path(tmp_path / "second", exporter)
    with pytest.raises((ValueError, AssertionError)):  # by us, or by the library that writes
        export(plan, name, second, runtime=runtime, like=wide_gguf, model=wide)
    assert leftovers(second.parent) == []


@pytest.mark.parametrize(("name", "runtime"), CHECKPOINTS)
def test_a_plan_broken_by_hand_is_refused(
    name: str, runtime: str, wide: LoadedModel, wide_gguf: Path, tmp_path: Path
) -> None:
    exporter = target(name)
    plan = mixed(wide, Rules.load(runtime))
    victim = next(n for n in plan.assignments if n.endswith("mlp.down_proj"))
    broken = hand_made(wide, plan.assignments | {victim: "int1-gt-asym"})
    out = out_path(tmp_path, exporter)
    with pytest.raises(ValueError, match=rf"(?s){runtime}.*{victim} in int1-gt-asym: bits: "):
        export(broken, name, out, runtime=runtime, like=wide_gguf, model=wide)
    assert leftovers(tmp_path) == []
    done = export(broken, name, out, runtime=runtime, like=wide_gguf, model=wide, round_up=True)
    assert set(done.changed) == {victim}
    assert Format.parse(done.changed[victim]).bits > 1
    assert "rounded up" in (done.source.plan.note or "")


@pytest.mark.parametrize(("name", "runtime"), CHECKPOINTS)
def test_a_writer_that_fails_leaves_nothing(
    name: str,
    runtime: str,
    wide: LoadedModel,
    wide_gguf: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exporter = target(name)
    plan = mixed(wide, Rules.load(runtime))
    source = open_source(plan, model=wide, like=wide_gguf)
    last = source.units[-1].name

    def fails(asked: str) -> PackedTensor:
        if asked in (last, list(plan.assignments)[-1]):
            raise OSError("No space left on device")
        return source.packed(asked)

    monkeypatch.setattr(
        "bitplan.exporters.export.open_source", lambda *_, **__: replace(source, packed=fails)
    )
    with pytest.raises(OSError, match="The disk is full"):
        export(plan, name, out_path(tmp_path, exporter), runtime=runtime, model=wide)
    assert leftovers(tmp_path) == []


def unfused(plan: Plan, rules: Rules) -> Iterator[str]:
    for group in rules.fused:
        yield next(n for n in plan.assignments if n.endswith(group[0]))


@pytest.mark.parametrize(("name", "runtime"), CHECKPOINTS)
def test_fused_modules_with_two_formats_are_refused_and_snapped(
    name: str, runtime: str, wide: LoadedModel
) -> None:
    rules = Rules.load(runtime)
    plan = mixed(wide, rules)
    source = open_source(plan, model=wide)
    for victim in unfused(plan, rules):
        other = next(f for f in rules.all_formats() if f.name != plan.assignments[victim])
        formats = source.formats | {victim: other}
        found = list(violations(source.everything, formats, rules))
        assert any("fused" in violation.reason for violation in found)
        left_out = {n: f for n, f in source.formats.items() if n != victim}
        assert any("fused" in v.reason for v in violations(source.everything, left_out, rules))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_names_every_matrix_or_its_layer(
    name: str, wide: LoadedModel, tmp_path: Path
) -> None:
    exporter = target(name)
    rules = Rules.load(exporter.runtimes[0]) if exporter.runtimes else None
    plan = mixed(wide, rules)
    out = tmp_path / f"plan{exporter.config_suffix}"
    done = export(plan, name, out, plan_only=True, model=wide)
    assert done.stored is None
    assert leftovers(tmp_path) == [out.name]
    changed = dict(plan.assignments)
    victim = next(n for n in changed if n.endswith("1.mlp.down_proj"))
    offered = [c for c in (rules.candidates if rules else ("int3-g32",)) if c != "keep"]
    changed[victim] = (
        next(c for c in offered if c != changed[victim]) if len(offered) > 1 else "bf16"
    )
    other = tmp_path / f"other{exporter.config_suffix}"
    export(hand_made(wide, changed), name, other, plan_only=True, model=wide)
    assert out.read_text() != other.read_text()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_reads_no_weights(
    name: str, wide: LoadedModel, wide_folder: Path, tmp_path: Path
) -> None:
    exporter = target(name)
    plan = mixed(wide, Rules.load(exporter.runtimes[0]) if exporter.runtimes else None)
    out, other = (tmp_path / f"{stem}{exporter.config_suffix}" for stem in ("out", "other"))
    export(plan, name, out, plan_only=True, model=wide)
    (tmp_path / "empty").mkdir()
    shutil.copy(wide_folder / "config.json", tmp_path / "empty")
    plan.model.id = str(tmp_path / "empty")
    export(plan, name, other, plan_only=True)
    text = other.read_text().replace(plan.model.id, wide.id)
    assert text == out.read_text()


@pytest.mark.parametrize("name", NAMES)
def test_targets_say_what_they_are(name: str) -> None:
    exporter = EXPORTERS.get(name)()
    assert find(shown_name(name))[0] == shown_name(name)
    assert (exporter.__doc__ or "").strip()
    assert exporter.form or exporter.config_suffix
    assert all(Rules.load(runtime) for runtime in exporter.runtimes)
    assert exporter.module or not exporter.extra  # what is installed can be looked for
