"""Name -> plugin lookup: one file per plugin, no central list to edit."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoints, entry_points
from pathlib import Path
from typing import Any, Generic, TypeVar

from .hints import did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """Plugins of one kind, found by file name inside ``package``.

    A built-in plugin ``ilp`` is the file ``<package>/ilp.py`` and is imported only when
    asked for.  Other distributions add plugins with an entry point in ``<root>.<kind>s``, or
    ``<root>.<plural>``.
    """

    def __init__(self, kind: str, package: str, plural: str | None = None) -> None:
        self.kind = kind
        self.package = package
        self.plural = plural or f"{kind}s"
        self._found: dict[str, T] = {}
        self._traits: dict[str, Mapping[str, Any]] = {}

    def register(self, name: str, **traits: Any) -> Callable[[T], T]:
        """Decorate the plugin object; ``name`` must equal its file name.

        Args:
            name: The name.
            **traits: What the plugin says of itself, read by :meth:`trait`: whoever uses plugins
                asks for a trait and never for a name.
        """

        def add(plugin: T) -> T:
            if name in self._found:
                raise ValueError(f"{self.kind} {name!r} is registered twice.")
            self._found[name], self._traits[name] = plugin, traits
            return plugin

        return add

    def names(self) -> list[str]:
        """All names, without importing any plugin."""
        external = {e.name for e in self._entry_points()}
        return sorted({*self.built_in(), *external, *self._found})

    def built_in(self) -> list[str]:
        """The names in ``package``, without looking at what else is installed."""
        package = importlib.import_module(self.package)
        return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.name[0] != "_")

    def get(self, name: str) -> T:
        """Return the plugin called ``name``."""
        if name not in self._found:
            if name not in self.names():
                raise ValueError(
                    f"Unknown {self.kind} {name!r}.{did_you_mean(name, self.names())} "
                    f"Available: {', '.join(self.names())}."
                )
            external = {e.name: e for e in self._entry_points()}
            if name in external:
                self._found[name] = external[name].load()
            else:
                importlib.import_module(f"{self.package}.{name}")
        return self._found[name]

    def docstring(self, name: str) -> str:
        """The docstring of a plugin; that of one which is not loaded is read from its file."""
        if name not in self._found:
            for folder in importlib.import_module(self.package).__path__:
                file = Path(folder, f"{name}.py")
                text = _docstring_in(file, name) if file.is_file() else None
                if text is not None:
                    return text
        return inspect.getdoc(self.get(name)) or ""

    def trait(self, name: str, trait: str, default: Any = None) -> Any:
        """What the plugin ``name`` was registered with as ``trait``."""
        return self.traits(name).get(trait, default)

    def traits(self, name: str) -> Mapping[str, Any]:
        """Everything the plugin ``name`` was registered with."""
        self.get(name)
        return self._traits.get(name, {})

    def _entry_points(self) -> EntryPoints:
        return entry_points(group=f"{self.package.split('.')[0]}.{self.plural}")


def _docstring_in(file: Path, name: str) -> str | None:
    """The docstring of what a file registers as ``name``; None if that is not plain to see."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            continue
        for decorator in node.decorator_list:
            match decorator:
                case ast.Call(
                    func=ast.Attribute(attr="register"), args=[ast.Constant(value=value), *_]
                ) if value == name:
                    return ast.get_docstring(node)
    return None
