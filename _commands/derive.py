"""Options of the command line, derived from the settings dataclasses that declare them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar, get_args, get_origin

import typer

from .._base.settings import Setting, settings_of
from ..jobs.limit_settings import PANELS

S = TypeVar("S")


@dataclass(frozen=True, slots=True)
class Given(Generic[S]):
    """What was typed of the settings of one dataclass.

    Attributes:
        settings: The dataclass.
        values: Every option as the command line read it; None or nothing for one left out.
    """

    settings: type[S]
    values: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        """The option of a setting as it was typed, or its default."""
        return self.values[name]

    def build(self, **others: Any) -> S:
        """The settings.

        Args:
            **others: Values that count instead of what was typed; None changes nothing.

        Raises:
            ValueError: If a text cannot be read, or settings do not go together.
        """
        read = {
            setting.name: _read(setting, self.values[setting.name])
            for setting in settings_of(self.settings)
            if _is_given(setting, self.values[setting.name])
        }
        return self.settings(**read | {k: v for k, v in others.items() if v is not None})


def derived(command: Callable[..., None]) -> Callable[..., None]:
    """Make a command that has the options of the settings it takes.

    A parameter annotated with ``Given[SomeSettings]`` becomes one option for every setting that
    the dataclass declares.
    """
    signature = inspect.signature(command, eval_str=True)
    taken: dict[str, type[Any]] = {}
    parameters: list[tuple[str, inspect.Parameter]] = []
    for parameter in signature.parameters.values():
        if get_origin(parameter.annotation) is Given:
            (cls,) = get_args(parameter.annotation)
            taken[parameter.name] = cls
            parameters += [(s.option.panel, _parameter(s)) for s in settings_of(cls)]
        else:
            parameters.append(("", parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)))
    parameters.sort(key=lambda entry: PANELS.index(entry[0]) if entry[0] else -1)

    @wraps(command)
    def run(**values: Any) -> None:
        for name, cls in taken.items():
            values[name] = Given(cls, {s.name: values.pop(s.name) for s in settings_of(cls)})
        command(**values)

    shown = [parameter for _, parameter in parameters]
    run.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in shown}
    return run


def split(text: str) -> tuple[str, ...]:
    """Comma-separated names."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _parameter(setting: Setting) -> inspect.Parameter:
    option = setting.option
    info: Any
    if option.argument:
        info = typer.Argument(metavar=option.argument, help=option.help)
    else:
        flags = option.flags or ("--" + setting.name.replace("_", "-"),)
        panel = option.panel or None
        info = typer.Option(*flags, help=option.help, min=option.minimum, rich_help_panel=panel)
    typed, default = _as_typed(setting)
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(setting.name, kind, default=default, annotation=Annotated[typed, info])


def _as_typed(setting: Setting) -> tuple[Any, Any]:
    """The type that the command line reads, and its default."""
    if setting.option.reads == "path":
        return Path | None, None
    if setting.option.reads:
        return str | None, None
    if _is_repeated(setting):
        return list[str] | None, None
    return setting.type, setting.default


def _is_repeated(setting: Setting) -> bool:
    """Whether the option may be given several times."""
    return get_origin(setting.type) in (tuple, Mapping)


def _is_given(setting: Setting, typed: Any) -> bool:
    return typed not in (None, []) and (typed != "" or setting.option.reads != "names")


def _read(setting: Setting, typed: Any) -> Any:
    """The value of a setting from what the command line read."""
    if setting.option.reads == "names":
        return split(typed)
    if setting.option.reads == "path":
        return str(typed)
    if setting.option.reads == "count":
        from ..search.limits.bops import parse_count

        return parse_count(typed)
    if get_origin(setting.type) is Mapping:
        return _read_mapping(setting, typed)
    return tuple(typed) if _is_repeated(setting) else typed


def _read_mapping(setting: Setting, texts: Sequence[str]) -> Any:
    """``GLOB=FORMAT`` texts: one format for a glob, or several."""
    from ..search.limits import parse_assignments, parse_bans

    if get_origin(get_args(setting.type)[1]) is tuple:
        return parse_bans(texts)
    return parse_assignments(setting.option.flags[0], texts)
