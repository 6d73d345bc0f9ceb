"""The formats that are tried unless others are asked for."""

from __future__ import annotations

DEFAULT_FORMATS = (
    *(f"int{bits}-g64-asym" for bits in (2, 3, 4, 5, 6, 8)),
    *(f"int{bits}-g32-asym" for bits in (2, 3, 4)),
    *(f"int{bits}-g128-asym" for bits in (3, 4)),
    "bf16",
)
