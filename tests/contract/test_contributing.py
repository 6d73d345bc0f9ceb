"""The one-file plugins of CONTRIBUTING.md, taken from its text, installed and held to contracts."""

from __future__ import annotations

import doctest
import importlib
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from torch import nn

from bitplan._base.registry import Registry
from bitplan.exporters.targets import EXPORTERS
from bitplan.models import sites
from bitplan.models.sites import SITES
from bitplan.models.workload import LoadedModel
from bitplan.quantizers import format as formats
from bitplan.quantizers.format import FAMILIES, Format
from bitplan.quantizers.methods import METHODS
from bitplan.search.solvers import SOLVERS
from bitplan.sensitivity.metrics import METRICS
from bitplan.testing import (
    ExporterContract,
    FamilyContract,
    MethodContract,
    MetricContract,
    SiteContract,
    SolverContract,
    toy_of,
)
from bitplan.testing.toys import drawn

PAGE = Path(__file__).parents[2] / "CONTRIBUTING.md"
REGISTRIES: dict[str, Registry[Any]] = {
    "sensitivity/metrics": METRICS,
    "search/solvers": SOLVERS,
    "quantizers/methods": METHODS,
    "quantizers/families": FAMILIES,
    "models/sites": SITES,
    "exporters/targets": EXPORTERS,
}
FILES = {
    match[1]: match[0].removeprefix("```python\n").removesuffix("```")
    for match in re.finditer(r"```python\n# (\S+\.py)\n.*?```", PAGE.read_text("utf-8"), re.DOTALL)
}


@contextmanager
def installed(path: str, folder: Path) -> Iterator[str]:
    """A file of the page as one more plugin; all traces of it are gone afterwards."""
    place, _, file = path.rpartition("/")
    registry, name = REGISTRIES[place], file.removesuffix(".py")
    package = importlib.import_module(registry.package)
    (folder / file).write_text(FILES[path], encoding="utf-8")
    package.__path__.append(str(folder))
    importlib.invalidate_caches()
    forget_names()
    try:
        yield name
    finally:
        package.__path__.remove(str(folder))
        registry._found.pop(name, None)
        registry._traits.pop(name, None)
        formats._INSTANCES.pop(name, None)
        sys.modules.pop(f"{registry.package}.{name}", None)
        vars(package).pop(name, None)
        forget_names()


def forget_names() -> None:
    """Of formats and sites, which are looked up once."""
    formats._parsed.cache_clear()
    sites._specific.cache_clear()


@pytest.fixture(scope="class")
def plugin(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The plugin that a class is about, for the time of the class."""
    with installed(request.cls.path, tmp_path_factory.mktemp("plugin")) as name:
        yield name


class Executed:
    """Besides its contract: the docstring's example, and that the plugin is found as it should."""

    path: str

    def test_is_found_by_its_file(self, name: str) -> None:
        registry = REGISTRIES[self.path.rpartition("/")[0]]
        assert name in registry.built_in()
        assert registry.docstring(name)

    def test_its_example_is_right(self, name: str) -> None:
        registry = REGISTRIES[self.path.rpartition("/")[0]]
        result = doctest.testmod(importlib.import_module(f"{registry.package}.{name}"))
        assert result.failed == 0
        assert result.attempted or registry in (SITES, EXPORTERS)


class Asked(Executed):
    """Also installed while tests are collected: these contracts ask the plugin for its cases."""

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        with TemporaryDirectory() as folder, installed(self.path, Path(folder)):
            super().pytest_generate_tests(metafunc)  # type: ignore[misc]


@pytest.mark.usefixtures("plugin")
class TestMetric(Executed, MetricContract):
    path = "sensitivity/metrics/relative_error.py"
    plugins = ("relative_error",)


@pytest.mark.usefixtures("plugin")
class TestSolver(Executed, SolverContract):
    path = "search/solvers/exchange.py"
    plugins = ("exchange",)


@pytest.mark.usefixtures("plugin")
class TestMethod(Executed, MethodContract):
    path = "quantizers/methods/descent.py"
    plugins = ("descent",)


class Bilinears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pairs, self.head = nn.Bilinear(6, 12, 20), nn.Linear(20, 8)

    def forward(self, x: Any) -> Any:
        return self.head(self.pairs(x[..., :6], x).tanh())


@pytest.mark.usefixtures("plugin")
class TestSite(Executed, SiteContract):
    path = "models/sites/bilinear.py"
    plugins = ("bilinear",)

    def toy(self, name: str) -> LoadedModel:
        return toy_of(Bilinears(), [drawn((2, 5, 12), seed) for seed in (1, 2)])


@pytest.mark.usefixtures("plugin")
class TestFamily(Asked, FamilyContract):
    path = "quantizers/families/e2m1.py"
    plugins = ("e2m1",)


@pytest.mark.usefixtures("plugin")
class TestExporter(Asked, ExporterContract):
    path = "exporters/targets/npz.py"
    plugins = ("npz",)


def test_the_page_leaves_nothing_behind() -> None:
    for path in FILES:
        place, _, file = path.rpartition("/")
        if place not in REGISTRIES:
            continue
        assert file.removesuffix(".py") not in REGISTRIES[place].names()
    with pytest.raises(ValueError, match="Unknown format 'e2m1-g64'"):
        Format.parse("e2m1-g64")


def test_every_file_of_the_page_is_tested() -> None:
    tested = {
        test.path for kind in (Executed, Asked) for test in kind.__subclasses__() if test != Asked
    }
    elsewhere = {"search/limits/share.py"}  # in unit/test_new_limit.py
    assert tested | elsewhere == FILES.keys()
    assert {path.rpartition("/")[0] for path in tested} == REGISTRIES.keys()
