"""Export a plan: check it, write it, read it back, and only then give the result its name."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .._base.files import atomic_path, check_place
from .._base.progress import Reporter
from ..jobs.folder import RunFolder, plan_path
from ..jobs.materialize import assignment_formats, is_packed
from ..models.find import find_matrices
from ..models.units import UnitInfo
from ..models.workload import LoadedModel
from ..quantizers.format import Format
from ..quantizers.runtimes import Rules
from ..search.plan import Plan
from ..sensitivity.table import SensitivityTable
from .card import write_card
from .checks import check, snap
from .configs.own_names import read_stored
from .source import Source, open_source
from .targets import EXPORTERS, Exporter, find


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written.

    Attributes:
        path: The file or folder.
        target: The target's name.
        source: Plan and weights it was made of.
        rules: The rules the plan was checked against; None for plain data.
        stored: Bytes of the planned matrices as the target stores them; None for a configuration.
        size: Bytes of the file, or of all files of the folder.
        changed: What ``snap`` rounded: module -> new format.
        usage: How the tool reads it.
    """

    path: Path
    target: str
    source: Source
    rules: Rules | None
    stored: int | None
    size: int
    changed: Mapping[str, str] = field(default_factory=dict)
    usage: str = ""


def export(
    target: Path | Plan,
    to: str,
    out: Path,
    *,
    plan_only: bool = False,
    round_up: bool = False,
    runtime: str | None = None,
    like: Path | None = None,
    model: LoadedModel | None = None,
    reporter: Reporter | None = None,
) -> Exported:
    """Write a plan, or the weights it describes, for another tool.

    Args:
        target: A plan, its file, a run folder or a packed folder.
        to: The target, or a runtime one is for.
        out: File or folder to write; it appears whole or not at all.
        plan_only: Write the tool's configuration instead of a checkpoint; the weights of the model
            are not read then.
        round_up: Round formats that the runtime lacks to the next it has, instead of refusing.
        runtime: The runtime to check for; by default the plan's own, or the target's first.
        like: A file of the same model that lends what the source lacks (GGUF metadata).
        model: The original model, when it is loaded already.
        reporter: Where progress is shown.

    Raises:
        ValueError: If the runtime cannot run the plan, the target cannot express it, or what was
            written does not read back as the plan.
    """
    name, exporter, asked = find(to)
    _check_form(name, exporter, out, plan_only)
    check_place(out, "--out")
    if not plan_only:
        _check_free(out, exporter)
    _check_needs(name, exporter)
    plan_runtime = _plan_of(target).runtime
    rules = _rules(name, exporter, runtime or asked, plan_runtime)
    changed: dict[str, str] = {}

    def change(plan: Plan, model: LoadedModel) -> Plan:
        if rules is None or not round_up:
            return plan
        formats = {name: Format.parse(spec) for name, spec in plan.assignments.items()}
        rounded, differences = snap(
            find_matrices(model.module, plan.row_ranges), plan, formats, rules
        )
        changed.update(differences)
        return rounded

    config = plan_only or exporter.form is None
    if rules is not None and not round_up and model is None and not config:
        _check_early(target, rules)
    source = open_source(
        target, model=model, change=change, like=like, weights=not config, reporter=reporter
    )
    if rules is not None:
        check(source.everything, source.formats, rules, source.plan.model.id)
    usage = exporter.usage(out, source)
    if config:
        text = exporter.config(source)
        with atomic_path(out) as temporary:
            temporary.write_text(text, encoding="utf-8")
        return Exported(out, name, source, rules, None, out.stat().st_size, changed, usage)
    with atomic_path(out) as temporary:
        if exporter.form == "folder":
            temporary.mkdir()
        exporter.write(source, temporary)
        stored = check_written(exporter, source, temporary, rules) if exporter.weights else None
        if exporter.form == "folder":
            source.plan.save(RunFolder(temporary).plan)
            run = target if isinstance(target, Path) and target.is_dir() else None
            write_card(source, name, rules, temporary, run, exporter.layout)
    return Exported(out, name, source, rules, stored, size_of(out), changed, usage)


def check_written(exporter: Exporter, source: Source, path: Path, rules: Rules | None) -> int:
    """Compare what a written checkpoint holds with the plan.

    Args:
        exporter: The target.
        source: The plan.
        path: What was written.
        rules: The runtime's rules, which say how many bytes it takes; None for our own.

    Returns:
        Bytes of the planned matrices in it.

    Raises:
        ValueError: If a matrix is missing, there is one too many, or one has another format or
            size than the plan says.
    """
    wanted, shapes, total = source.formats, source.shapes, 0
    count = rules.stored_bytes if rules else Format.stored_bytes
    integers = {name for name, fmt in wanted.items() if not fmt.floating}
    floats = wanted.keys() - integers
    for stored in read_stored(exporter, path, source.model):
        fmt = wanted.get(stored.name)
        if fmt is None or stored.name not in integers:
            if stored.fmt.floating:
                total += stored.nbytes if fmt else 0
                floats -= {stored.name}
                continue
            if exporter.copies and fmt is None:
                continue
            raise ValueError(f"{path} quantizes {stored.name!r}, which the plan does not.")
        integers.discard(stored.name)
        size = count(fmt, shapes[stored.name])
        if stored.fmt != fmt or stored.nbytes != size:
            raise ValueError(
                f"{path} holds {stored.name!r} as {stored.fmt} in {stored.nbytes:,} B, but the "
                f"plan says {fmt} in {size:,} B. Nothing was kept; please report this."
            )
        total += stored.nbytes
    if integers:
        raise ValueError(f"{path} does not hold {min(integers)!r} as the plan says.")
    return total + sum(count(wanted[name], shapes[name]) for name in floats)


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _rules(name: str, exporter: Exporter, asked: str | None, planned: str | None) -> Rules | None:
    if asked is not None and asked not in exporter.runtimes:
        Rules.load(asked)  # raises if there is no such runtime at all
        raise ValueError(
            f"{name} files are checked for {', '.join(exporter.runtimes) or 'no runtime'}, not for "
            f"{asked}: that is `--to {asked}`."
        )
    if not exporter.runtimes:
        return None
    fitting = planned if planned in exporter.runtimes else exporter.runtimes[0]
    return Rules.load(asked or fitting)


def _check_early(target: Path | Plan, rules: Rules) -> None:
    """Check a plan whose profile lies beside it before the model is loaded.

    The profile has all that was priced, which is not all of the model: this finds no rule broken
    that the check on the model does not, and may find fewer.
    """
    if isinstance(target, Plan):
        return
    plan, profile = _plan_of(target), RunFolder.around(target).profile
    if not profile.is_file():
        return
    table = SensitivityTable.load(profile)
    if table.provenance.model.sha256 != plan.model.sha256:
        return  # another model's profile
    units = [
        UnitInfo(
            part.name,
            (part.name,),
            (part.shape,),
            unit.kind,
            unit.layer,
            unit.aliases if len(unit.modules) == 1 else (),
            () if part.rows is None else (part.rows,),
        )
        for unit in table.units
        for part in unit.parts
    ]
    check(units, assignment_formats(plan), rules, plan.model.id)


def _plan_of(target: Path | Plan) -> Plan:
    if isinstance(target, Plan):
        return target
    return Plan.load(plan_path(target))


def _check_form(name: str, exporter: Exporter, out: Path, plan_only: bool) -> None:
    config = plan_only or exporter.form is None
    if config and exporter.config_suffix is None:
        raise ValueError(f"{name} has no configuration of its own: leave out --plan-only.")
    suffix = exporter.config_suffix if config else exporter.suffix
    if suffix and out.suffix != suffix:
        raise ValueError(
            f"--out {out} would not be a {suffix} file, which {name} needs. "
            f"Give a name such as model{suffix}."
        )
    if (config or exporter.form == "file") and out.is_dir():
        raise ValueError(f"--out {out} is a folder, but a file is to be written. Choose another.")
    if not config and exporter.form == "folder" and out.is_file():
        raise ValueError(f"--out {out} is a file, but {name} is a folder. Choose another --out.")


def _check_free(out: Path, exporter: Exporter) -> None:
    """Refuse to replace a folder that is not an export."""
    if exporter.form == "folder" and out.is_dir() and any(out.iterdir()):
        folder = RunFolder(out)
        ours = folder.plan.is_file() and not folder.job.is_file() and not is_packed(out)
        if not ours or not any(EXPORTERS.get(name)().recognizes(out) for name in EXPORTERS.names()):
            raise ValueError(f"{out} exists and is not an exported model. Choose another --out.")


def _check_needs(name: str, exporter: Exporter) -> None:
    for module in exporter.needs:
        if importlib.util.find_spec(module) is None:
            raise ValueError(f"{name} needs {module}: pip install 'bitplan[{exporter.extra}]'.")
