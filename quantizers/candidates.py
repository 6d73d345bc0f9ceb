"""Menus: the formats that are tried unless others are asked for, and other lists with a name."""

from __future__ import annotations

from collections.abc import Iterable

from .runtimes import Rules, names

INTEGERS = (
    *(f"int{bits}-g64-asym" for bits in (2, 3, 4, 5, 6, 8)),
    *(f"int{bits}-g32-asym" for bits in (2, 3, 4)),
    *(f"int{bits}-g128-asym" for bits in (3, 4)),
)
DEFAULT_FORMATS = (*INTEGERS, "bf16")
NORMAL = (
    *(f"nl{bits}-g64" for bits in (2, 3, 4)),
    *(f"vq{bits}-g64" for bits in (2, 3)),
    *(f"tcq{bits}" for bits in (2, 3, 4)),
)
MENUS = {
    "default": DEFAULT_FORMATS,
    "int": (*INTEGERS, "keep"),
    "all": (*INTEGERS, *NORMAL, "keep"),
}


def expanded(specs: Iterable[str]) -> tuple[str, ...]:
    """The names with those of menus, and the candidates of runtimes, in place of their names.

    >>> expanded(["tcq2", "int"])[:3]
    ('tcq2', 'int2-g64-asym', 'int3-g64-asym')
    >>> expanded(["gptq"])[0]
    'int2-g32'
    """
    found: list[str] = []
    for spec in specs:
        if spec in MENUS:
            found += MENUS[spec]
        elif spec in names():
            found += Rules.load(spec).candidates
        else:
            found.append(spec)
    return tuple(found)
