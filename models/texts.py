"""Names that stand for a text: what may be given where a text file could be."""

from __future__ import annotations

BUILTIN = "builtin"  # English prose that ships with Python
SELF = "self"  # sampled from the model itself; to calibrate only
