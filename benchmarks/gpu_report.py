"""A page to read of what ``gpu_check.py`` found: the JSON's figures, as tables in Markdown.

    PYTHONPATH=.typing python benchmarks/gpu_report.py benchmarks/results/gpu.json

Remarks under ``remarks`` in the JSON, what is known of a run beside its figures, come first.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bitplan._base.files import atomic_path

Row = Mapping[str, Any]


def report(found: Row) -> str:
    """The page; sections that did not run, or failed before they found anything, are left out."""
    about, sections = found["about"], found["sections"]
    lines = [f"# bitplan on {about['device']}", "", _about(about), ""]
    for remark in found.get("remarks", ()):
        lines += [f"- {remark}"]
    lines += [""] if found.get("remarks") else []
    rows = [(name, s["status"], f"{s.get('seconds', 0):.1f}") for name, s in sections.items()]
    lines += ["## Sections", "", *_table(("section", "status", "seconds"), rows)]
    for name, section in sections.items():
        if name in _PARTS:
            lines += list(_PARTS[name](name, section))
    return "\n".join(lines).rstrip() + "\n"


def write_report(found: Row, path: Path) -> None:
    """Write the page, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(report(found), encoding="utf-8")


def _about(about: Row) -> str:
    parts = [f"torch {about['torch']}", f"Triton {about['triton']}", f"Python {about['python']}"]
    card = ""
    if "processors" in about:
        card = (
            f"{about['processors']} multiprocessors, {about['memory_gb']:.0f} GB, "
            f"{about['cache_mb']:.0f} MB of cache; CUDA {about['cuda']}, "
        )
    made = f"Made by `{about['command']}`" if "command" in about else f"Seed {about['seed']}"
    commit = f", commit {about['commit']}" if about.get("commit") else ""
    return f"{made}{commit}. {card}{', '.join(parts)}."


def _correctness(_name: str, section: Row) -> Iterator[str]:
    if "checks" not in section:
        return
    yield from (
        "## Correctness",
        "",
        f"{section['checks']} products against float64 products of what torch decodes: "
        f"**{section['wrong']} wrong**, {section['skipped']} skipped for want of time.",
        "",
    )
    rows = []
    bounds = sorted({row["bound"] for row in section["rows"] if "bound" in row})
    for bound in bounds:
        errors = [row["error"] for row in section["rows"] if row.get("bound") == bound]
        right = [error for error in errors if error <= bound]
        largest = f"{max(right):.1e}" if right else "–"
        rows.append((f"{bound:g}", len(errors), len(errors) - len(right), largest))
    yield from _table(("error allowed", "checks", "beyond", "largest of the others"), rows)
    for row in section["rows"]:
        if "failure" in row:
            yield f"- Failed: `{row['case']}`: {row['failure']}"
        elif row["error"] > row["bound"]:
            yield f"- Wrong: `{row['case']}`: error {row['error']:.2g}, allowed {row['bound']:g}"
    yield ""


def _copy(_name: str, section: Row) -> Iterator[str]:
    if "bytes_per_s" in section:
        yield from (
            "## Copy",
            "",
            f"{section['bytes_per_s'] / 1e12:.2f} TB/s, read and written bytes together. The "
            "memory bound below is the time that this takes for weights, inputs and outputs.",
            "",
        )


_RACES = {
    "decode": "## Few vectors: decode",
    "prefill": "## Many vectors: prefill",
}


def _race(name: str, section: Row) -> Iterator[str]:
    rows = section.get("rows", [])
    if not rows:
        return
    tokens = sorted({row["m"] for row in rows})
    yield from (
        _RACES[name],
        "",
        "In every cell: µs of a product within a CUDA graph, how many times as fast as torch's "
        "bfloat16 product of the same shape, and % of the memory bound. Activations in bfloat16; "
        "mixes are of rows or columns of one matrix.",
        "",
    )
    shapes = list(dict.fromkeys((row["n"], row["k"]) for row in rows))
    head = ("weights", *(f"m = {m}" for m in tokens))
    for n, k in shapes:
        yield from (f"### {n} × {k}", "")
        by: dict[str, dict[int, str]] = {}
        for row in rows:
            if (row["n"], row["k"]) == (n, k):
                by.setdefault(row["kernel"], {})[row["m"]] = (
                    f"{row['us']:.1f} · {row['speedup']:.2f} · {100 * row['of_memory_bound']:.0f} %"
                )
        yield from _table(head, [(kernel, *map(c.get, tokens)) for kernel, c in by.items()])
    yield from _ranges(rows, tokens, len(shapes))


def _ranges(rows: Sequence[Row], tokens: Sequence[int], shapes: int) -> Iterator[str]:
    """How packed weights do beside 16 bits, in one line per number of vectors."""
    table = []
    for m in tokens:
        for what, mixed in (("one width", False), ("mixes", True)):
            some = [
                row["speedup"]
                for row in rows
                if row["m"] == m and row["kernel"].startswith("int")
                if ("+" in row["kernel"]) is mixed
            ]
            if some:
                slower = sum(speedup < 1 for speedup in some)
                span = f"{min(some):.2f} to {max(some):.2f}"
                table.append((m, what, span, f"{slower} of {len(some)}"))
    if table:
        yield from (f"### Packed weights beside bfloat16, all {shapes} shapes", "")
        yield from _table(("m", "weights", "times as fast", "slower than bfloat16"), table)


def _model(name: str, section: Row) -> Iterator[str]:
    rows = section.get("rows", [])
    if not rows:
        return
    yield from (
        f"## A Llama of random weights: {name.removeprefix('model-').upper()}",
        "",
        "Tokens per second of all sequences together, in a replayed CUDA graph and in plain "
        "calls from Python; a dash where that was not measured.",
        "",
    )
    head = ("weights", "what", "batch", "context", "tokens/s, graph", "tokens/s, plain")
    yield from _table(
        head,
        [
            (
                row["model"],
                row["what"],
                row["batch"],
                row["context"],
                _rate(row.get("graph_tokens_per_s")),
                _rate(row.get("plain_tokens_per_s")),
            )
            for row in rows
        ],
    )
    memory = [
        (
            row["model"],
            f"{row['weights_gb']:.2f}",
            *(f"{row[key]:.2f}" if key in row else None for key in ("peak_gb", "build_peak_gb")),
            f"{row['build_s']:.1f}",
        )
        for row in section.get("memory", [])
    ]
    sizes = ("weights", "GB of weights", "peak GB, running", "peak GB, building", "s to build")
    yield from _table(sizes, memory)


def _rate(value: float | None) -> str | None:
    """Tokens per second; 0 is what an earlier table had for nothing."""
    return f"{value:,.0f}" if value else None


def _profile(_name: str, section: Row) -> Iterator[str]:
    if "metric_over_plain" not in section:
        return
    size = f"{section['sequences']} sequences of {section['length']} tokens"
    yield from (
        "## Profile",
        "",
        f"{section['units']} units in {len(section['formats'])} formats, {size}, batches of "
        f"{section['batch']}, float32. A plain forward and backward pass over them takes "
        f"{section['plain_s']:.2f} s, the default metric {section['metric_s']:.2f} s "
        f"({section['metric_over_plain']:.1f} times as long, {section['metric_peak_gb']:.1f} GB at "
        f"most), rounding all weights to nearest in all formats {section['rounding_s']:.2f} s; "
        f"both together {section['profile_over_plain']:.1f} times the plain pass.",
        "",
    )


def _refit(_name: str, section: Row) -> Iterator[str]:
    if "median_error" not in section:
        return
    yield from (
        "## Latency model",
        "",
        f"Fitted to {section['timings']} decode timings: median error "
        f"{100 * section['median_error']:.1f} %, largest {100 * section['largest_error']:.0f} %; "
        f"before, {100 * section['median_error_before']:.0f} % (median).",
        "",
    )


def _sweep(_name: str, section: Row) -> Iterator[str]:
    by: dict[tuple[Any, ...], list[Row]] = {}
    for row in section.get("rows", []):
        by.setdefault((row["kernel"], f"{row['n']} × {row['k']}", row["m"]), []).append(row)
    if not by:
        return
    table = []
    for case, rows in by.items():
        best = min(rows, key=lambda row: float(row["us"]))
        ruled = next(row for row in rows if row["by_rule"])
        ways = (ruled["launch"], f"{ruled['us']:.1f}", best["launch"], f"{best['us']:.1f}")
        table.append((*case, len(rows), *ways))
    head = ("weights", "shape", "m", "ways tried", "by rule", "µs", "best", "µs")
    yield from (
        "## Ways to launch",
        "",
        "A way is tokens per program, warps, cells in flight, parts of K.",
        "",
    )
    yield from _table(head, table)


_PARTS: dict[str, Callable[[str, Row], Iterator[str]]] = {
    "correctness": _correctness,
    "copy": _copy,
    "decode": _race,
    "prefill": _race,
    "model-1b": _model,
    "model-8b": _model,
    "profile": _profile,
    "refit": _refit,
    "sweep": _sweep,
}


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    if not rows:
        return []
    lines = [head, ["---"] * len(head), *rows]
    shown = [["–" if cell is None else str(cell) for cell in line] for line in lines]
    return [*("| " + " | ".join(line) + " |" for line in shown), ""]


if __name__ == "__main__":
    for name in sys.argv[1:]:
        file = Path(name)
        write_report(json.loads(file.read_text(encoding="utf-8")), file.with_suffix(".md"))
