"""Settings, each declared once: a field with its type, its default and what it means to a user.

A command line derives its options from the fields, so a new setting is one line.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal, get_type_hints

_KEY = "option"


@dataclass(frozen=True, slots=True)
class Option:
    """How a setting is asked for.

    Attributes:
        help: What it means, in a sentence or two.
        flags: Such as ``--eval``; by default the field's name.
        panel: Heading that it is listed under; empty for none.
        minimum: The smallest number that makes sense; None for any.
        reads: How a text becomes its value where the type does not say: ``names`` are separated by
            commas, a ``count`` may be written ``12G``, and a ``path`` is a file.
        argument: Name in upper case of one that is given by its place, not by a flag.
    """

    help: str
    flags: tuple[str, ...] = ()
    panel: str = ""
    minimum: int | None = None
    reads: Literal["", "names", "count", "path"] = ""
    argument: str = ""


@dataclass(frozen=True, slots=True)
class Setting:
    """A field of a settings dataclass.

    Attributes:
        name: Its name.
        type: Its type.
        default: Its default.
        option: How it is asked for.
    """

    name: str
    type: Any
    default: Any
    option: Option


def setting(
    default: Any,
    help: str,
    *flags: str,
    panel: str = "",
    minimum: int | None = None,
    reads: Literal["", "names", "count", "path"] = "",
    argument: str = "",
) -> Any:
    """Declare a field of a settings dataclass that users may set.

    Args:
        default: Its default, or a function that makes it (``dict``).
        help: What it means; like the others below, see :class:`Option`.
        *flags: As there.
        panel: As there.
        minimum: As there.
        reads: As there.
        argument: As there.

    >>> @dataclass
    ... class Oven:
    ...     heat: int = setting(180, "Degrees.", minimum=50)
    >>> Oven().heat, settings_of(Oven)[0].option.help
    (180, 'Degrees.')
    """
    metadata = {_KEY: Option(help, flags, panel, minimum, reads, argument)}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def settings_of(cls: type[Any]) -> list[Setting]:
    """The settings that a dataclass declares, in order; fields for internal use are left out."""
    types = get_type_hints(cls)
    found = []
    for each in fields(cls):
        if option := each.metadata.get(_KEY):
            made = None if each.default_factory is MISSING else each.default_factory()
            default = made if each.default is MISSING else each.default
            found.append(Setting(each.name, types[each.name], default, option))
    return found
