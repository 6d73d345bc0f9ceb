"""The model card of an exported folder: README.md as the Hub expects it."""

from __future__ import annotations

import math
import re
import shutil
from collections import Counter
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from ..jobs.folder import RunFolder
from ..models.wording import words_of
from ..quantizers.format import Format
from ..quantizers.runtimes import Rules
from ..search.coverage import bits_per, describe_coverage
from .source import Source

FIGURES = {  # of a run
    "frontier": "KL divergence over size: this plan, uniform plans, the bound",
    "allocation": "Bits of every matrix, by layer",
}


def write_card(
    source: Source,
    target: str,
    rules: Rules | None,
    folder: Path,
    run: Path | None = None,
    layout: str | None = None,
) -> Path:
    """Write README.md: what the model is, how its bits are spread, how it was made.

    Args:
        source: Plan and weights.
        target: The target's name.
        rules: What the plan was checked against.
        folder: Where to write.
        run: A run folder, whose figures are taken along.
        layout: The target whose files these are; by default the target itself.

    Returns:
        The file.
    """
    plan, shapes = source.plan, source.shapes
    count = rules.stored_bytes if rules else Format.stored_bytes
    counts = Counter(plan.assignments.values())
    weights = Counter[str]()
    stored = Counter[str]()
    for name, fmt in source.formats.items():
        weights[fmt.name] += math.prod(shapes[name])
        stored[fmt.name] += count(fmt, shapes[name])
    rows = [
        (name, counts[name], weights[name] / plan.weights, 8 * stored[name] / weights[name])
        for name in sorted(counts, key=lambda name: stored[name] / weights[name])
    ]
    size = stored.total()
    # What the rest of the model takes does not depend on the target.
    whole = None if plan.model_bytes is None else plan.model_bytes - plan.bytes + size
    environment = Environment(
        loader=PackageLoader("bitplan.exporters", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    base = plan.model.id if re.fullmatch(r"[\w.-]+/[\w.-]+", plan.model.id) else None  # on the Hub
    figures = {}
    for name, alt in FIGURES.items():
        figure = None if run is None else RunFolder(run).figure(name)
        if figure is not None and figure.is_file():
            shutil.copyfile(figure, folder / figure.name)
            figures[figure.name] = alt
    text = environment.get_template("card.md").render(
        plan=plan,
        words=words_of(plan.calibration),
        target=target,
        layout=layout or target,
        rules=rules,
        rows=rows,
        size=size,
        whole=whole,
        coverage=describe_coverage(plan.coverage) if plan.coverage else None,
        bpw=8 * size / plan.weights,
        bits_per=bits_per(plan.coverage),
        base=base,
        name=Path(plan.model.id).name,
        figures=figures,
    )
    path = folder / "README.md"
    path.write_text(text, encoding="utf-8")
    return path
