"""The classes of transformers that a language model is loaded with."""

from __future__ import annotations

import logging as standard
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from .trust import is_trusted


def loader_of(config: Any) -> Any:
    """The automatic class that makes a model of this configuration: text, or images and text."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    if _is_in(AutoModelForCausalLM, config) or not _is_in(AutoModelForImageTextToText, config):
        return AutoModelForCausalLM
    return AutoModelForImageTextToText


def family_of(config: Any) -> Any:
    """The class itself; that of a checkpoint's own code, which has to be trusted, included.

    Raises:
        ValueError: If transformers has none.
    """
    own = getattr(config, "auto_map", None) or {}
    if "AutoModelForCausalLM" in own and is_trusted():
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        return get_class_from_dynamic_module(own["AutoModelForCausalLM"], config._name_or_path)
    check_family(config)
    found = loader_of(config)._model_mapping[type(config)]
    return found[0] if isinstance(found, tuple) else found


def check_family(config: Any) -> None:
    """Raise a ValueError if transformers has no language model of this configuration."""
    own = getattr(config, "auto_map", None) or {}
    loader = loader_of(config)
    if not _is_in(loader, config) and "AutoModelForCausalLM" not in own:
        raise ValueError(
            f"transformers has no language model of type {getattr(config, 'model_type', '?')!r}"
        )


def can_be_rebuilt(module: nn.Module) -> bool:
    """Whether transformers can make the model again of its configuration."""
    config = getattr(module, "config", None)
    if config is None or not hasattr(config, "save_pretrained"):
        return False
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return True
    try:
        return isinstance(module, family_of(config))
    except (ValueError, KeyError):
        return False


@contextmanager
def quiet(bars: bool = True) -> Iterator[None]:
    """Inside the block, transformers prints nothing but errors; bars of progress only if asked."""
    from transformers.utils import logging

    verbosity, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not bars:
        logging.disable_progress_bar()
    tokenizers = standard.getLogger("tokenizers")
    level = tokenizers.level
    tokenizers.setLevel(standard.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        tokenizers.setLevel(level)
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


def _is_in(loader: Any, config: Any) -> bool:
    return type(config) in loader._model_mapping
