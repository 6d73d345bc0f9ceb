"""GGUF files through transformers, which opens one several times for a model."""

from __future__ import annotations

import functools
import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from unittest import mock

from .gguf_parts import open_gguf


@contextmanager
def read_once() -> Iterator[None]:
    """Inside the block, a GGUF file is parsed once, whoever opens it how often.

    Config, tokenizer and weights each open the file anew, and parsing the tens of thousands of
    tokens in its header takes longer than reading the weights does; the table of tensor names is
    made anew for every module.  Of a file in parts all are read.  The gguf package's own bar, which
    obeys no setting, is not shown.
    """
    import gguf

    plain = gguf.GGUFReader
    reader = functools.cache(lambda path: open_gguf(Path(path), plain))
    names = functools.cache(gguf.get_tensor_name_map)
    with (
        mock.patch.object(gguf, "GGUFReader", reader),
        mock.patch.object(gguf, "get_tensor_name_map", names),
        redirect_stderr(io.StringIO()),
    ):
        yield
