"""Which group of a compressed-tensors configuration a module belongs to, and what it stores."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from .folder import TensorFiles

PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
ORDER = "weight_g_idx"  # the group of every column, where columns were reordered
# Of the cache and of activations: they say nothing of weights.
_ELSEWHERE = ("k_scale", "v_scale", "q_scale", "k_zero_point", "v_zero_point")
_INPUTS = ("input_scale", "input_zero_point", "output_scale", "output_zero_point")


def group_of(
    module: str, groups: Mapping[str, Mapping[str, Any]], kinds: tuple[str, ...] = ("Linear",)
) -> Mapping[str, Any] | None:
    """The group whose target is the most specific for a module.

    Its name counts before regular expressions, and these before classes, whatever the order of
    the groups; of several expressions the first in alphabetical order, and of groups that have the
    same target the last.

    Args:
        module: Its name.
        groups: The groups, by any key.
        kinds: Names of its class and of the classes above.

    Returns:
        The group; None if no target matches.

    >>> groups = {"a": {"targets": ["Linear"]}, "b": {"targets": ["re:.*down$"]}}
    >>> group_of("mlp.down", groups) is groups["b"], group_of("mlp.up", groups) is groups["a"]
    (True, True)
    """
    by_target = {target: group for group in groups.values() for target in group["targets"]}
    if module in by_target:
        return by_target[module]
    for target in sorted(by_target):
        if target.startswith("re:") and re.match(target.removeprefix("re:"), module):
            return by_target[target]
    return next((by_target[kind] for kind in kinds if kind in by_target), None)


def class_names(module: nn.Module | None) -> tuple[str, ...]:
    """Names of a module's class and of those above; of an unknown one that of linear layers."""
    if module is None:
        return ("Linear",)
    return tuple(kind.__name__ for kind in type(module).__mro__ if issubclass(kind, nn.Module))


def packed_modules(path: Path, config: Mapping[str, Any], files: TensorFiles) -> Iterator[str]:
    """Names of the modules whose weights are packed integers.

    Args:
        path: The folder, for messages.
        config: Its quantization_config.
        files: Its tensors.

    Raises:
        ValueError: If a module is quantized in any other way; it is named, and so is the way.
    """
    parts: dict[str, set[str]] = {}
    for name in files:
        module, _, part = name.rpartition(".")
        parts.setdefault(module, set()).add(part)
    for module, found in parts.items():
        ours = found - {*_ELSEWHERE, *_INPUTS, "bias"}
        if "weight_packed" in ours and ours <= {*PARTS, ORDER}:
            yield module
            continue
        other = sorted(part for part in ours if part.startswith("weight_"))
        kind = files.dtype(f"{module}.weight") if "weight" in ours else ""
        if other or kind.startswith(("F8", "I8", "U8", "F4")):
            group = group_of(module, config["config_groups"]) or {}
            raise ValueError(
                f"{path}: {module!r} is stored as {_scheme(group, config)} "
                f"({', '.join(sorted(ours))}), for which bitplan has no format: of "
                "compressed-tensors it reads pack-quantized weights."
            )


def _scheme(group: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """A format and its numbers, in words."""
    weights = group.get("weights") or {}
    form = group.get("format") or config.get("format") or "a format it does not name"
    numbers = f"{weights.get('num_bits', '?')}-bit {weights.get('type', 'numbers')}"
    return f"{form}, {numbers}"
