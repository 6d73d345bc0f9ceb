"""Names that stand for a model or a text, where a path could be given."""

from __future__ import annotations

DEFAULT_MODEL = "smollm2"  # the embedded default
BUILTIN = "builtin"  # English prose that ships with Python
SELF = "self"  # text sampled from the model itself; to calibrate only
