"""Which kernels run packed layers on a device.

Triton on CUDA and ROCm, the compiled kernels on a CPU, the torch reference anywhere else.
``BITPLAN_KERNEL=reference|triton|cpu`` decides otherwise.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Literal

import torch

from . import native

Kernel = Literal["reference", "triton", "cpu"]
VARIABLE = "BITPLAN_KERNEL"
_NAMES: dict[str, Kernel] = {"reference": "reference", "triton": "triton", "cpu": "cpu"}


def kernel_for(device: torch.device) -> Kernel:
    """The kernels for packed weights on ``device``.

    Raises:
        ValueError: If ``BITPLAN_KERNEL`` names none, or those that cannot run there.
    """
    wanted = os.environ.get(VARIABLE, "")
    if not wanted:
        if device.type == "cuda":  # ROCm calls itself cuda, too
            return "triton" if find_spec("triton") else "reference"
        return "cpu" if device.type == "cpu" else "reference"
    kernel = _NAMES.get(wanted)
    if kernel is None:
        raise ValueError(
            f"{VARIABLE} is {wanted!r}, but the kernels are called "
            f"{', '.join(_NAMES)}. Set one of these, or nothing to have the best one."
        )
    if obstacle := _obstacle(kernel, device):
        raise ValueError(
            f"{VARIABLE}={kernel} cannot run on {device.type!r}: {obstacle}. Set another one, or "
            "nothing to have the best one."
        )
    return kernel


def _obstacle(kernel: Kernel, device: torch.device) -> str | None:
    """What keeps kernels from running on a device."""
    if kernel == "triton":
        if not find_spec("triton"):
            return "triton is not installed"
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return "it needs a CUDA or ROCm device, or TRITON_INTERPRET=1 to be interpreted"
    if kernel == "cpu":
        if device.type != "cpu":
            return "these kernels are for CPUs"
        return native.unavailable()
    return None
