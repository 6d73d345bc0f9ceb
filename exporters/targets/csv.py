"""A table for spreadsheets and scripts."""

from __future__ import annotations

import csv
import io

from ...quantizers.runtimes import byte_count
from ..source import Source
from . import EXPORTERS, Exporter


@EXPORTERS.register("csv")
class Csv(Exporter):
    """A table, one line per matrix."""

    config_suffix = ".csv"

    def config(self, source: Source) -> str:
        """One line per matrix, or part of one, in the order of the model.

        A plan with parts has a last column with their rows, such as ``0:128 256:320``.
        """
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        heads = ["module", "format", "bits", "group_size", "symmetric", "rows", "cols", "bytes"]
        parts = source.plan.row_ranges
        table.writerow([*heads, "row_ranges"] if parts else heads)
        formats, shapes, count = source.formats, source.shapes, byte_count(source.plan.runtime)
        for unit in source.units:
            fmt, (rows, cols) = formats[unit.name], shapes[unit.name]
            group = "" if fmt.floating else cols if fmt.group_size == 0 else fmt.group_size
            size = count(fmt, (rows, cols))
            row = [unit.name, fmt.name, fmt.bits, group, int(fmt.symmetric), rows, cols, size]
            ranges = " ".join(f"{start}:{stop}" for start, stop in parts.get(unit.name, ()))
            table.writerow([*row, ranges] if parts else row)
        return text.getvalue()
