"""What every export target promises: what is written is the plan, or nothing is."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from ..exporters.checks import violations
from ..exporters.export import Exported, export
from ..exporters.source import Source, open_source
from ..exporters.targets import EXPORTERS, Exporter, find, shown_name
from ..exporters.verify import weight_error
from ..models.load import load_model
from ..models.workload import LoadedModel
from ..quantizers.format import Format
from ..quantizers.packed import PackedTensor
from ..quantizers.runtimes import Rules, byte_count
from ..search.plan import Plan
from .contract import Contract
from .llama import save_toy_llama
from .plans import hand_made, mixed

VICTIM = "model.layers.1.mlp.down_proj"  # gets another format


class ExporterContract(Contract):
    """Checkpoints hold the plan's formats, bytes and weights; configurations tell plans apart.

    Tests of checkpoints run for every runtime that the target is checked against.
    """

    @pytest.fixture(scope="class")
    def model_folder(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """A Hugging Face folder."""
        return save_toy_llama(tmp_path_factory.mktemp("llama"))

    @pytest.fixture(scope="class")
    def model(self, model_folder: Path) -> LoadedModel:
        """A Llama of two layers whose rows are long enough for every format."""
        return load_model(str(model_folder), "cpu")

    @pytest.fixture(scope="class")
    def like(self) -> Path | None:
        """A file of the same model, for targets that need one to lend what a plan lacks."""
        return None

    @pytest.fixture
    def exporter(self, name: str) -> Exporter:
        """The target; the test is skipped if writing takes a package that is missing."""
        exporter = self.plugin(name)()
        for module in exporter.needs:
            if find_spec(module) is None:
                pytest.skip(f"needs {module}")
        return exporter

    @pytest.fixture
    def rules(self, runtime: str | None) -> Rules | None:
        """The runtime's rules; None for plain data."""
        return Rules.load(runtime) if runtime else None

    @pytest.fixture
    def plan(self, model: LoadedModel, rules: Rules | None) -> Plan:
        """A plan that goes through the runtime's candidates."""
        return mixed(model, rules)

    @pytest.fixture
    def write(
        self, name: str, model: LoadedModel, like: Path | None, runtime: str | None
    ) -> Callable[..., Exported]:
        """Exports a plan to a path."""

        def write(plan: Plan, out: Path, *, round_up: bool = False) -> Exported:
            return export(
                plan, name, out, runtime=runtime, like=like, model=model, round_up=round_up
            )

        return write

    @pytest.fixture
    def source(self, plan: Plan, model: LoadedModel, like: Path | None) -> Source:
        """What the exporter is given."""
        return open_source(plan, model=model, like=like)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Checkpoints: every runtime of a target. Configurations: every target that has one."""
        if "runtime" in metafunc.fixturenames:
            pairs = [
                (name, runtime)
                for name in self.plugins
                if self.plugin(name).form and self.plugin(name).weights
                for runtime in self.plugin(name).runtimes or (None,)
            ]
            if metafunc.function.__name__.startswith("test_modules_that_run_as_one"):
                pairs = [(name, r) for name, r in pairs if r and Rules.load(r).fused]
            metafunc.parametrize(("name", "runtime"), pairs)
        elif metafunc.function.__name__.startswith("test_a_configuration"):
            names = [name for name in self.plugins if self.plugin(name).config_suffix]
            metafunc.parametrize("name", names)
        else:
            super().pytest_generate_tests(metafunc)

    def plugin(self, name: str) -> type[Exporter]:
        """The target's class."""
        return EXPORTERS.get(name)

    def test_says_what_it_is(self, name: str) -> None:
        """A checkpoint, a configuration or both, for runtimes that have rules."""
        exporter = self.plugin(name)()
        assert find(shown_name(name))[0] == shown_name(name)
        assert exporter.form or exporter.config_suffix
        assert all(Rules.load(runtime) for runtime in exporter.runtimes)
        assert exporter.module or not exporter.extra  # what is installed can be looked for

    def test_a_written_checkpoint_is_the_plan(
        self,
        exporter: Exporter,
        runtime: str | None,
        rules: Rules | None,
        plan: Plan,
        write: Callable[..., Exported],
        model: LoadedModel,
        tmp_path: Path,
    ) -> None:
        """Format, shape, bytes and weights of every matrix; the same bytes again."""
        out = out_path(tmp_path, exporter)
        done = write(plan, out)
        assert leftovers(tmp_path) == [out.name]
        formats, shapes = done.source.formats, done.source.shapes
        found = {stored.name: stored for stored in exporter.read(out, model)}
        quantized = {unit: fmt for unit, fmt in formats.items() if not fmt.floating}
        offered = 3 if rules is None else len(rules.candidates)
        assert len({fmt.name for fmt in formats.values()}) > 1 or offered < 3
        for unit, fmt in quantized.items():
            assert found[unit].fmt == fmt
            assert found[unit].shape == shapes[unit]
            assert found[unit].nbytes == byte_count(runtime)(fmt, shapes[unit])
        others = [s for name, s in found.items() if name not in formats]
        assert all(stored.fmt.floating for stored in others)
        assert weight_error(exporter, done.source, out) <= exporter.max_weight_error
        again = out_path(tmp_path / "again", exporter)
        write(plan, again)
        assert contents(again) == contents(out)

    def test_swapped_scales_are_noticed(
        self,
        exporter: Exporter,
        runtime: str | None,
        plan: Plan,
        source: Source,
        write: Callable[..., Exported],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Weights are compared, not formats alone."""
        victim = next(n for n, fmt in source.formats.items() if not fmt.floating)
        right = source.packed(victim)
        # The rows of the scales change places; the codes stay.
        wrong = {k: v if k == "codes" else v.flip(0) for k, v in right.tensors.items()}
        give(monkeypatch, source, {victim: PackedTensor(right.fmt, right.shape, wrong)})
        out = out_path(tmp_path, exporter)
        write(plan, out)
        with pytest.raises(ValueError, match=victim):
            weight_error(exporter, source, out)

    def test_a_wrong_width_is_noticed(
        self,
        exporter: Exporter,
        runtime: str | None,
        rules: Rules | None,
        plan: Plan,
        source: Source,
        write: Callable[..., Exported],
        model: LoadedModel,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """By bitplan, or by the library that writes; nothing is left behind."""
        victim, fmt = next((n, f) for n, f in source.formats.items() if not f.floating)
        offered = rules.all_formats() if rules else (Format.parse("int3-g32"),)
        other = next((f for f in offered if not f.floating and f.bits != fmt.bits), None)
        if other is None:
            pytest.skip(f"{runtime} has one width")
        changed = hand_made(model, plan.assignments | {victim: other.name})
        wrong = open_source(changed, model=model).packed(victim)
        give(monkeypatch, source, {victim: wrong})
        with pytest.raises((ValueError, AssertionError)):
            write(plan, out_path(tmp_path, exporter))
        assert leftovers(tmp_path) == []

    def test_a_plan_broken_by_hand_is_refused_or_rounded_up(
        self,
        exporter: Exporter,
        runtime: str | None,
        plan: Plan,
        write: Callable[..., Exported],
        model: LoadedModel,
        tmp_path: Path,
    ) -> None:
        """With the rule that it breaks."""
        if runtime is None:
            pytest.skip("plain data: no rules to break")
        broken = hand_made(model, plan.assignments | {VICTIM: "int1-gt-asym"})
        out = out_path(tmp_path, exporter)
        with pytest.raises(ValueError, match=rf"(?s){runtime}.*{VICTIM} in int1-gt-asym: bits: "):
            write(broken, out)
        assert leftovers(tmp_path) == []
        done = write(broken, out, round_up=True)
        assert set(done.changed) == {VICTIM}
        assert Format.parse(done.changed[VICTIM]).bits > 1
        assert "rounded up" in (done.source.plan.note or "")

    def test_modules_that_run_as_one_share_a_format(
        self,
        exporter: Exporter,
        runtime: str,
        plan: Plan,
        source: Source,
        write: Callable[..., Exported],
        model: LoadedModel,
        tmp_path: Path,
    ) -> None:
        """Two formats, or one module left out, are refused, or rounded up to the wider one."""
        rules = Rules.load(runtime)
        for number, group in enumerate(rules.fused):
            members = [n for n in plan.assignments if n.rpartition(".")[2] in group and ".1." in n]
            assert len(members) == len(group)
            victim, before = members[0], Format.parse(plan.assignments[members[0]])
            without = {n: f for n, f in source.formats.items() if n != victim}
            assert any("fused" in v.reason for v in violations(source.everything, without, rules))
            other = another(rules, before)
            changed = hand_made(model, plan.assignments | {victim: other.name})
            out = out_path(tmp_path / str(number), exporter)
            out.parent.mkdir()
            with pytest.raises(ValueError, match="fused: it runs as one matrix"):
                write(changed, out)
            assert leftovers(out.parent) == []
            done = write(changed, out, round_up=True)
            taken = {done.source.formats[member] for member in members}
            assert len(taken) == 1
            assert taken.pop().bits == max(before.bits, other.bits)
            assert set(done.changed) in ({victim}, set(members) - {victim})

    def test_a_writer_that_fails_leaves_nothing(
        self,
        exporter: Exporter,
        runtime: str | None,
        plan: Plan,
        source: Source,
        write: Callable[..., Exported],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """As when the disk is full at the last matrix."""
        last = {source.units[-1].name, list(plan.assignments)[-1]}
        give(monkeypatch, source, dict.fromkeys(last, OSError("No space left on device")))
        with pytest.raises(OSError, match="The disk is full"):
            write(plan, out_path(tmp_path, exporter))
        assert leftovers(tmp_path) == []

    def test_a_configuration_tells_plans_apart(
        self, name: str, exporter: Exporter, model: LoadedModel, tmp_path: Path
    ) -> None:
        """A change of any one matrix changes the text."""
        rules = Rules.load(exporter.runtimes[0]) if exporter.runtimes else None
        plan = mixed(model, rules)
        texts = {configuration(name, exporter, plan, model, tmp_path)}
        planned = [n for n, f in plan.assignments.items() if not Format.parse(f).floating]
        for victim in planned:
            other = another(rules, Format.parse(plan.assignments[victim])).name
            group = [victim]
            for fused in rules.fused if rules else ():
                parent, _, last = victim.rpartition(".")
                group = [f"{parent}.{m}" for m in fused] if last in fused else group
            changed = hand_made(model, plan.assignments | dict.fromkeys(group, other))
            texts.add(configuration(name, exporter, changed, model, tmp_path))
        fused_away = sum(len(group) - 1 for group in (rules.fused if rules else ())) * 2
        assert len(texts) == 1 + len(planned) - fused_away

    def test_a_configuration_reads_no_weights(
        self, name: str, exporter: Exporter, model: LoadedModel, model_folder: Path, tmp_path: Path
    ) -> None:
        """The model's ``config.json`` is enough."""
        plan = mixed(model, Rules.load(exporter.runtimes[0]) if exporter.runtimes else None)
        text = configuration(name, exporter, plan, model, tmp_path)
        (tmp_path / "empty").mkdir()
        shutil.copy(model_folder / "config.json", tmp_path / "empty")
        plan.model.id = str(tmp_path / "empty")
        without = configuration(name, exporter, plan, None, tmp_path)
        assert without.replace(plan.model.id, model.id) == text


def configuration(
    name: str, exporter: Exporter, plan: Plan, model: LoadedModel | None, folder: Path
) -> str:
    """The text that the target writes for a plan, and nothing beside it."""
    out = folder / "configuration" / f"plan{exporter.config_suffix}"
    out.parent.mkdir(exist_ok=True)
    done = export(plan, name, out, plan_only=True, model=model)
    assert done.stored is None
    assert leftovers(out.parent) == [out.name]
    return out.read_text(encoding="utf-8")


def another(rules: Rules | None, fmt: Format) -> Format:
    """Another format of the runtime that quantizes, of another width if there is one."""
    offered = rules.all_formats() if rules else map(Format.parse, ("int3-g32", "int5-g64-asym"))
    others = [f for f in offered if not f.floating and f != fmt]
    return max(others, key=lambda other: other.bits != fmt.bits)


def give(
    monkeypatch: pytest.MonkeyPatch, source: Source, instead: dict[str, PackedTensor | OSError]
) -> None:
    """Make ``export`` get other packed weights, or an error, for some matrices of the source."""

    def packed(asked: str) -> PackedTensor:
        found = instead.get(asked)
        if isinstance(found, OSError):
            raise found
        return found or source.packed(asked)

    monkeypatch.setattr(
        "bitplan.exporters.export.open_source", lambda *_, **__: replace(source, packed=packed)
    )


def out_path(folder: Path, exporter: Exporter) -> Path:
    """Where a checkpoint is written."""
    return folder / f"out{exporter.suffix}"


def leftovers(folder: Path) -> list[str]:
    """What is in a folder, temporary files too."""
    return sorted(path.name for path in folder.iterdir())


def contents(path: Path) -> list[tuple[str, bytes]]:
    """All files of a checkpoint."""
    files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    return sorted((str(p.relative_to(path)), p.read_bytes()) for p in files)
