"""Commands: options that settings declare, files that are loaded when asked for, and no torch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from bitplan import __main__ as program
from bitplan._base.settings import setting
from bitplan._commands.derive import Given, derived
from bitplan.jobs.limit_settings import LIMITS
from bitplan.jobs.settings import SearchSettings
from bitplan.search.plan import Plan
from bitplan.sensitivity.metrics import METRICS
from bitplan.tests.fakes import fake_run, transformer_units

BLOCKED = "import sys; sys.modules['torch'] = sys.modules['transformers'] = None; "
LAZY = ("scipy", "pulp", "optuna", "sqlalchemy", "matplotlib")  # slow to load


@dataclass(frozen=True)
class Oven:
    dish: str = setting("bread", "What to bake.", argument="DISH")
    heat: int = setting(180, "Degrees.", minimum=50, panel=LIMITS)
    extras: tuple[str, ...] = setting((), "Put on top; repeatable.", "--extra")
    shelves: tuple[str, ...] = setting(("middle",), "Comma-separated.", reads="names")
    power: float | None = setting(None, "Such as 2k.", reads="count")
    recipe: str | None = setting(None, "A file.", reads="path")
    pins: Mapping[str, str] = setting(dict, "GLOB=FORMAT; repeatable.", "--pin")
    bans: Mapping[str, tuple[str, ...]] = setting(dict, "GLOB=FORMATS; repeatable.", "--ban")
    fan: bool = setting(False, "Turn it on.")
    secret: int = 7


def bake(*words: str) -> tuple[Oven, int, Any]:
    """The settings that a command line means, the option of the command itself, and its output."""
    app = typer.Typer()
    found: dict[str, Any] = {}

    @app.command()
    @derived
    def main(
        *, asked: Given[Oven], guests: Annotated[int, typer.Option(help="Who eats.")] = 2
    ) -> None:
        """Bake."""
        found.update(oven=asked.build(secret=8), guests=guests)

    result = CliRunner().invoke(app, list(words), env={"COLUMNS": "200"})
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return found.get("oven", Oven()), found.get("guests", 0), result


def test_settings_left_out_have_their_defaults() -> None:
    assert bake()[:2] == (Oven(secret=8), 2)


def test_options_are_read_as_the_fields_types() -> None:
    words = "cake --heat 200 --extra nuts --extra ice --shelves top,low --power 2k --recipe a.txt"
    more = "--pin a=int4 --pin b=int8 --ban a=int2*,int3* --fan --guests 5"
    oven, guests, _ = bake(*words.split(), *more.split())
    assert oven == Oven(
        dish="cake",
        heat=200,
        extras=("nuts", "ice"),
        shelves=("top", "low"),
        power=2000.0,
        recipe="a.txt",
        pins={"a": "int4", "b": "int8"},
        bans={"a": ("int2*", "int3*")},
        fan=True,
        secret=8,
    )
    assert guests == 5


def test_help_says_what_the_settings_say() -> None:
    shown = bake("--help")[2].output
    for text in ("DISH", "What to bake.", "[default: bread]", "--extra", "x>=50", "default: 180"):
        assert text in shown
    assert LIMITS in shown
    assert "--no-fan" not in shown and "--secret" not in shown


@pytest.mark.parametrize("words", [["--heat", "10"], ["--secret", "1"], ["--heat", "hot"]])
def test_what_no_setting_takes_is_refused(words: list[str]) -> None:
    assert bake(*words)[2].exit_code == 2


def test_a_text_that_cannot_be_read_names_its_flag() -> None:
    with pytest.raises(ValueError, match=r"--pin 'lm_head' is not GLOB=FORMAT"):
        bake("--pin", "lm_head")


def test_a_search_asks_for_one_goal() -> None:
    refused = CliRunner().invoke(
        program.app, ["search", "tiny", "--budget", "4bpw", "--vram", "1GB"]
    )
    assert "--budget and --vram were given" in str(refused.exception)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "a"
    return fake_run(folder, transformer_units(2), search=SearchSettings("4.3bpw"))


def ended(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def typed(words: list[str], after: str = "") -> str:
    """What a command prints where torch cannot be imported; ``after`` runs when it is done."""
    return ended(
        BLOCKED + f"sys.argv = ['bitplan', *{words!r}]\n"
        "from bitplan.__main__ import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        + after
    )


@pytest.mark.parametrize(
    "words",
    [
        ["solve", "{run}", "--budget", "3.5bpw", "--group", "q_proj,k_proj"],
        ["solve", "{run}", "--budget", "4.5bpw", "--for", "mlx"],
        ["solve", "{run}", "--max-bops", "1G", "--latency-device", "h100"],
        ["frontier", "{run}"],
        ["compare", "{run}", "{run}/plan.json"],
        ["jobs", "{run}"],
        ["formats"],
        ["solvers"],
        ["metrics"],
        ["--version"],
    ],
    ids=" ".join,
)
def test_what_needs_no_model_loads_no_torch(run: Path, words: list[str]) -> None:
    assert typed([word.format(run=run) for word in words]).strip()


def test_no_help_loads_torch() -> None:
    said = ended(
        BLOCKED + "from typer.testing import CliRunner\n"
        "from bitplan.__main__ import _VERBS, app\n"
        "for verb in ('', *_VERBS):\n"
        "    shown = CliRunner().invoke(app, [*verb.split(), '--help'])\n"
        "    assert shown.exit_code == 0 and '--help' in shown.output, (verb, shown)\n"
        "    print(verb)"
    )
    assert {"solve", "import", "kernels"} < set(said.split())


@pytest.mark.parametrize("rest", [["--help"], ["{run}", "--budget", "3.5bpw"]])
def test_a_command_loads_only_what_it_needs(run: Path, rest: list[str]) -> None:
    after = f"print(*(n for n in sys.modules if n.startswith('bitplan._comm') or n in {LAZY!r}))"
    said = typed(["solve", *(word.format(run=run) for word in rest)], after)
    loaded = {name.removeprefix("bitplan._commands.") for name in said.splitlines()[-1].split()}
    assert loaded == {"bitplan._commands", "console", "derive", "lazy", "options", "solve"}


def test_the_python_interface_solves_without_torch(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    ended(
        BLOCKED + "import pathlib, bitplan\n"
        f"plan = bitplan.solve({str(run / 'profile.safetensors')!r}, '3.5bpw')\n"
        f"plan.save(pathlib.Path({str(path)!r}))"
    )
    assert Plan.load(path).bpw <= 3.5


def test_metrics_are_described_without_loading_them() -> None:
    """As they describe themselves, whether or not they are loaded."""
    read = ended(
        BLOCKED + "from bitplan.sensitivity.metrics import METRICS\n"
        "print(repr({n: METRICS.docstring(n) for n in METRICS.names()}))"
    )
    for name in METRICS.names():
        METRICS.get(name)
    assert read.strip() == repr({name: METRICS.docstring(name) for name in METRICS.names()})


def test_a_command_that_is_not_there_is_explained() -> None:
    result = CliRunner().invoke(program.app, ["solv", "x"])
    assert result.exit_code == 2
    assert "solve" in result.output
