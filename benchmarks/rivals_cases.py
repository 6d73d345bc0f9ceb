"""Which rival quantizes with which settings, the cheap and the telling ones first."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

LLAMA = "llama.cpp"
# Tool -> the name that --python gives its environment by.
PYTHONS = {
    "gptqmodel": "gptqmodel",
    "autoround": "autoround",
    "autoscheme": "autoround",
    "hqq": "hqq",
    "modelopt": "modelopt",
    LLAMA: LLAMA,  # a folder: --llama-bin
}
SHOWN = {
    "gptqmodel": "GPTQModel",
    "autoround": "AutoRound",
    "autoscheme": "AutoRound, AutoScheme",
    "hqq": "HQQ",
    "modelopt": "ModelOpt, auto_quantize",
    LLAMA: "llama.cpp",
}


@dataclass(frozen=True)
class Case:
    """One rival with one setting.

    Attributes:
        tool: A key of :data:`SHOWN`.
        name: Short name of the setting.
        settings: What the tool is called with.
    """

    tool: str
    name: str
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Name of its files."""
        return f"{self.tool}-{self.name}"

    def among(self, wanted: Collection[str]) -> bool:
        """Whether it was asked for, by its tool or its key."""
        return self.tool in wanted or self.key in wanted


def _integers(tool: str, bits_key: str, *names: str) -> list[Case]:
    """Cases of uniform integers by names such as ``3g64``."""
    found = []
    for name in names:
        bits, group = map(int, name.split("g"))
        found.append(Case(tool, name, {bits_key: bits, "group_size": group}))
    return found


def _mixed(tool: str, **budgets: dict[str, Any]) -> list[Case]:
    return [Case(tool, name.strip("_").replace("_", "."), s) for name, s in budgets.items()]


def _llama(*types: str) -> list[Case]:
    return [Case(LLAMA, name, {"type": name}) for name in types]


# ModelOpt counts bits without scales: a float16 scale for 64 weights is a quarter of a bit.
def _modelopt(bpw: float) -> dict[str, Any]:
    return {"bits": [2, 3, 4], "group_size": 64, "bpw": round(bpw - 0.25, 4)}


def _autoscheme(bpw: float) -> dict[str, Any]:
    return {"avg_bits": bpw, "options": "W2A16G64,W3A16G64,W4A16G64,W4A16G32"}


CASES: tuple[Case, ...] = (
    *_llama("IQ4_XS"),
    *_integers("gptqmodel", "bits", "3g64", "4g64"),
    *_integers("hqq", "nbits", "3g64"),
    *_llama("Q2_K", "Q3_K_M"),
    *_mixed("modelopt", _3_28=_modelopt(3.28)),
    *_integers("autoround", "bits", "3g64"),
    *_integers("gptqmodel", "bits", "2g32"),
    *_integers("hqq", "nbits", "4g64", "2g32", "2g64"),
    *_mixed("autoscheme", _3_28=_autoscheme(3.28), _4_3=_autoscheme(4.3)),
    *_llama("IQ3_S", "Q4_K_S", "IQ2_M", "Q4_0"),
    *_mixed("modelopt", _4_25=_modelopt(4.25), _3_0=_modelopt(3.0), _2_5=_modelopt(2.5)),
    *_integers("autoround", "bits", "4g64", "2g32"),
    *_integers("gptqmodel", "bits", "2g64", "3g32"),
)
