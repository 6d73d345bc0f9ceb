"""Names that stand for a model or a text, where a path could be given."""

from __future__ import annotations

DEFAULT_MODEL = "smollm2"  # the embedded default
BUILTIN = "builtin"  # English prose that ships with Python; `prose` means the same
PROSE = "prose"
CODE = "code"  # source of Python's standard library
CHAT = "chat"  # questions and answers made from its documentation strings
LANGUAGES = "languages"  # sampled from the model, from first words in several languages
SELF = "self"  # text sampled from the model itself; to calibrate only
MIXTURE = "mixture"  # several of these; to calibrate only

SHIPPED = (BUILTIN, CODE, CHAT)  # texts with a part that is held out
SAMPLED = (LANGUAGES, SELF)  # drawn from the model
