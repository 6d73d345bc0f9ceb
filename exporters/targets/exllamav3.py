"""Recipes of ExLlamaV3."""

from __future__ import annotations

from pathlib import Path

from ..source import Source
from . import EXPORTERS, Exporter

UNQUANTIZED = 16


@EXPORTERS.register("exllamav3")
class ExLlamaV3(Exporter):
    """A recipe for ExLlamaV3's convert.py."""

    runtimes = ("exllamav3",)
    config_suffix = ".yaml"

    def config(self, source: Source) -> str:
        """Bits per matrix; ExLlamaV3 quantizes itself, on a GPU.

        ``tensors`` covers every matrix but the head, whose bits are ``head_bits``.
        """
        formats = source.formats
        bits = {}
        for unit in source.everything:
            fmt = formats.get(unit.name)
            bits[unit.name] = fmt.bits if fmt and fmt.integer else UNQUANTIZED
        tensors = {
            name: width
            for name, width in bits.items()
            if not name.endswith("lm_head") and "embed" not in name
        }
        shapes = {unit.name: unit.shapes[0] for unit in source.everything}
        low = {name: width for name, width in tensors.items() if width != UNQUANTIZED}
        weights = sum(shapes[name][0] * shapes[name][1] for name in low)
        total = sum(width * shapes[name][0] * shapes[name][1] for name, width in low.items())
        lines = [f"target_bpw: {total / max(1, weights):.4f}"]
        lines.append(f"head_bits: {bits.get('lm_head', UNQUANTIZED)}")
        lines.append("tensors:")
        lines += [f"  {name}: {width}" for name, width in tensors.items()]
        return "\n".join(lines) + "\n"

    def usage(self, path: Path, source: Source) -> str:
        """The command of ExLlamaV3."""
        return f"python convert.py -i MODEL -o OUT -w WORK --recipe {path}"
