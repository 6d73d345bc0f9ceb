"""`bitplan solve` and `bitplan frontier` on a saved profile: the same limits, the same checks."""

from __future__ import annotations

import os
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bitplan.__main__ import app
from bitplan.quantizers.format import Format
from bitplan.search.frontier import Frontier
from bitplan.search.plan import Plan
from bitplan.sensitivity.table import SensitivityTable
from bitplan.tests.fakes import fake_run, transformer_units

LIMITS = [
    ["--pin", "mlp.up_proj=int4-g64-asym"],
    ["--ban", "mlp.down_proj=int2*,int3*"],
    ["--min", "self_attn.*=int4"],
    ["--max", "*.mlp.*=int4"],
    ["--formats", "int3-g64-asym,int8-g64-asym"],
    ["--group", "q_proj,k_proj,v_proj"],
    ["--for", "mlx"],
]


def run(*words: str | Path) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    return fake_run(tmp_path / "run", transformer_units(2), measured=False) / "profile.safetensors"


def assignments(frontier: Frontier, table: SensitivityTable, nbytes: int) -> dict[str, str]:
    """Module -> format of the frontier's plan; units of a group share one."""
    modules = {module: u for u, unit in enumerate(table.units) for module in unit.modules}
    assert frontier.units == tuple(unit.name for unit in table.units)
    choice = frontier.at(nbytes)
    return {module: frontier.formats[choice[u]] for module, u in modules.items()}


@pytest.mark.parametrize("limit", LIMITS, ids=lambda limit: limit[0])
def test_every_limit_on_formats_holds_for_the_frontier(
    profile: Path, tmp_path: Path, limit: list[str]
) -> None:
    """Its plans are those of `bitplan solve`, and without the limit they are others."""
    files = [tmp_path / "limited.json", tmp_path / "free.json"]
    run("frontier", profile, "--out", files[0], *limit)
    run("frontier", profile, "--out", files[1])
    limited, free = map(Frontier.load, files)
    assert limited.to_json() != free.to_json()
    assert limited.model is not None
    table = SensitivityTable.load(profile)
    if limit[0] == "--group":
        table = table.merged(limit[1:])
        assert len(limited.units) < len(free.units)
    if limit[0] == "--for":  # fuses nothing, and lacks some formats
        assert limited.units == free.units
    for point in range(0, len(limited.bytes), 5):
        nbytes = int(limited.bytes[point])
        run("solve", profile, "--budget", f"{nbytes}B", "--out", tmp_path / "plan.json", *limit)
        plan = Plan.load(tmp_path / "plan.json")
        assert plan.predicted_kl == pytest.approx(float(limited.predicted_kl[point]))
        assert plan.assignments == assignments(limited, table, nbytes)


def test_limits_on_formats_are_kept(profile: Path, tmp_path: Path) -> None:
    """All at once, at every step of the frontier."""
    out = tmp_path / "f.json"
    run("frontier", profile, "--out", out, *LIMITS[1], *LIMITS[2], *LIMITS[3])
    frontier, table = Frontier.load(out), SensitivityTable.load(profile)
    for nbytes in frontier.bytes.tolist():
        for module, name in assignments(frontier, table, nbytes).items():
            bits = Format.parse(name).bits
            assert bits >= 4 or not fnmatchcase(module, "*.down_proj")
            assert bits >= 4 or ".self_attn." not in module
            assert bits <= 4 or ".mlp." not in module


def test_a_run_folder_stands_for_its_profile(profile: Path) -> None:
    assert run("frontier", profile.parent) == run("frontier", profile)
    for options in ([], ["--budget", "3.5bpw"]):
        assert run("solve", profile.parent, *options) == run("solve", profile, *options)


def test_names_that_match_nothing_come_with_one_that_does(profile: Path) -> None:
    for option in ("--formats", "--pin"):
        value = {"--formats": "int4", "--pin": "*=int4"}[option]
        with pytest.raises(ValueError, match="Did you mean 'int4-g64-asym' or 'int4-"):
            run("solve", profile, option, value)
    with pytest.raises(ValueError, match=r"One is called 'model\.layers\.0"):
        run("solve", profile, "--pin", "QQQ=int4-g64-asym")


def test_a_group_that_matches_nothing_is_refused(profile: Path) -> None:
    with pytest.raises(ValueError, match=r"--group 'gate,up' matches nothing"):
        run("solve", profile, "--group", "gate,up")
    run("solve", profile, "--group", "gate_proj,up_proj", "--group", "gate_proj,up_proj")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["solve", "--out", "plan.txt"], r"--out plan.txt would not be a .json file.*plan.json"),
        (["solve", "--out", "folder"], r"--out folder is a folder.*folder/plan.json"),
        (["solve", "--out", "file/plan.json"], "file is a file, not a folder"),
        (["solve", "--program", "p.txt"], r"--program p.txt would not be a .lp or .mps file"),
        (["frontier", "--out", "f.csv"], r"f.csv would not be a .json file.*frontier.json"),
    ],
)
def test_where_a_plan_goes_is_checked_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=message):
        run(words[0], "no-profile-here.safetensors", *words[1:])


@pytest.mark.skipif(sys.platform != "linux" or not os.path.isdir("/proc"), reason="needs /proc")
def test_a_folder_that_cannot_be_written_is_found_out_first() -> None:
    with pytest.raises(ValueError, match=r"/proc/plan.json cannot be written: no file can be made"):
        run("solve", "no-profile-here.safetensors", "--out", "/proc/plan.json")


def test_what_a_profile_lacks_for_a_runtime_is_said(profile: Path) -> None:
    said = run("solve", profile, "--budget", "6bpw", "--for", "mlx")
    assert "formats that suit mlx: a search or profile with --for mlx finds better plans" in said
    assert "lacks" not in run("solve", profile, "--budget", "6bpw")


def test_a_run_for_a_runtime_says_so_when_it_is_left_out(profile: Path) -> None:
    plan = Plan.load(profile.parent / "plan.json")
    plan.model_copy(update={"runtime": "mlx"}).save(profile.parent / "plan.json")
    said = run("frontier", profile.parent)
    assert "was searched for mlx: --for mlx keeps to it" in said
    assert "was searched for" not in run("frontier", profile.parent, "--for", "mlx")
