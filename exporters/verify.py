"""Compare an exported model in the foreign tool with ours: KL divergence and logits."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..models.measure import Run
from ..models.samples import Samples, evaluation_samples
from ..models.workload import Batch
from .configs.own_names import read_stored
from .export import Exported
from .source import Source
from .targets import EXPORTERS, Exporter, find


@dataclass(frozen=True, slots=True)
class Comparison:
    """How far the foreign tool's logits are from ours.

    Attributes:
        kl: KL(ours || theirs), mean nats per token.
        max_error: Largest absolute difference of a log-probability that both think likelier than
            1e-4.
        relative: ||theirs - ours|| / ||ours|| of the logits, each centred per token.
        top1: Share of tokens with the same likeliest outcome.
        tokens: Tokens compared.
        max_kl: Most KL that the tool's own arithmetic explains.
        skipped: Tokens that the tool gave no distribution for, and which are left out.
    """

    kl: float
    max_error: float
    relative: float
    top1: float
    tokens: int
    max_kl: float
    skipped: int = 0

    @property
    def agrees(self) -> bool:
        """Whether the difference is no more than the tool's own arithmetic."""
        return self.kl <= self.max_kl


def verify(
    exported: Exported, text: str = "builtin", tokens: int = 512, python: str | None = None
) -> Comparison:
    """Run the exported checkpoint in the foreign tool and our dequantized model on the same text.

    Args:
        exported: What was written.
        text: ``builtin`` or a text file.
        tokens: Tokens to compare on.
        python: The interpreter of another environment that has the tool and bitplan; None for
            this one.

    Raises:
        ValueError: If the tool is not installed, or there is nothing to load.
    """
    _, exporter, _ = find(exported.target)
    if exporter.form is None or exported.stored is None:
        raise ValueError(f"{exported.path} holds a plan and no weights: there is nothing to run.")
    if python is None and not exporter.installed():
        tool = f"'bitplan[{exporter.extra}]'" if exporter.extra else exporter.module
        raise ValueError(
            f"{exported.path} was written and matches the plan, but was not run: {exporter.module} "
            f"is not installed here. Install it (pip install {tool}) or give the --python of an "
            "environment that has it."
        )
    source = exported.source
    most, asked = exporter.most_tokens() if python is None else None, tokens
    tokens = min(tokens, most or tokens)
    samples = evaluation_samples(source.model, text, tokens, min(128, tokens))
    why = f", not {asked:,}: the tool is slow here" if tokens < asked else ""
    source.reporter.say(f"Comparing logits on {tokens:,} tokens{why}")
    if python is None:
        run = exporter.logits(exported.path)
    else:
        run = _elsewhere(exported, python, samples)
    return compare(source.logits, run, samples.batches, exporter.max_kl)


def weight_error(exporter: Exporter, source: Source, path: Path) -> float:
    """How far the weights that a written checkpoint means are from ours, without the foreign tool.

    Returns:
        The largest |theirs - ours| relative to the largest weight of its matrix.

    Raises:
        ValueError: If that is more than the target's layout explains; the matrix is named.
    """
    worst = 0.0
    wanted = source.formats
    with source.reporter.bar("Comparing weights", len(wanted)) as advance:
        for stored in read_stored(exporter, path, source.model):
            if stored.name not in wanted:
                continue
            ours = source.packed(stored.name).dequantize()
            difference = (stored.weight() - ours).abs().max() / ours.abs().max().clamp_min(1e-30)
            if not difference <= exporter.max_weight_error:
                raise ValueError(
                    f"{path} holds other weights of {stored.name!r} than the plan means: they "
                    f"differ by up to {float(difference):.2g} of the largest. Export it again."
                )
            worst = max(worst, float(difference))
            advance(1)
    return worst


def compare(ours: Run, theirs: Run, batches: Sequence[Batch], max_kl: float) -> Comparison:
    """Compare two models' logits on the same batches.

    Positions where the second says that it has no distribution, all -inf, are left out, and
    counted. NaN is no such: it is a KL of NaN, which agrees with nothing.

    Raises:
        ValueError: If no position is left.
    """
    kl = error = norm = distance = 0.0
    same = tokens = skipped = 0
    with torch.no_grad():
        for batch in batches:
            a, b = ours(batch).double(), theirs(batch).double()  # KLs of 1e-9 are told from 0
            known = ~(b == -torch.inf).all(-1)
            skipped += int((~known).sum())
            a, b = a[known], b[known]
            if not len(b):
                continue
            p, q = a.log_softmax(-1), b.log_softmax(-1)
            kl += float((p.exp() * (p - q)).sum(-1).sum())
            likely = (p > np.log(1e-4)) & (q > np.log(1e-4))
            error = max(error, float((p - q)[likely].abs().max()) if likely.any() else 0.0)
            centred = a - a.mean(-1, keepdim=True)
            distance += float((b - b.mean(-1, keepdim=True) - centred).square().sum())
            norm += float(centred.square().sum())
            same += int((a.argmax(-1) == b.argmax(-1)).sum())
            tokens += len(a)
    if not tokens:
        raise ValueError(
            f"The tool gave no distribution for any of {skipped:,} tokens. Compare on another text."
        )
    relative = (distance / norm) ** 0.5 if norm else 0.0
    return Comparison(kl / tokens, error, relative, same / tokens, tokens, max_kl, skipped)


def _elsewhere(exported: Exported, python: str, samples: Samples) -> Run:
    """Run all batches in another interpreter; the answers in order."""
    if not all(isinstance(batch, Tensor) for batch in samples.batches):
        raise ValueError("--python works with models that take one tensor.")
    with tempfile.TemporaryDirectory() as folder:
        inputs, outputs = Path(folder, "inputs.npz"), Path(folder, "outputs.npz")
        arrays = [batch.numpy() for batch in samples.batches if isinstance(batch, Tensor)]
        np.savez(inputs, *arrays)
        words = [python, "-m", __name__, exported.target, exported.path, inputs, outputs]
        done = subprocess.run([str(w) for w in words], capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip() or "no message").splitlines()[-1]
            raise ValueError(
                f"{python} could not run {exported.path}: {last}. It needs bitplan and the extra "
                f"of {exported.target}."
            )
        with np.load(outputs) as file:
            answers = iter([torch.from_numpy(file[name]) for name in file.files])
    return lambda _batch: next(answers)


def main(target: str, path: str, inputs: str, outputs: str) -> None:
    """The other interpreter's part: load a checkpoint, run all batches, save the logits."""
    run = EXPORTERS.get(target.replace("-", "_"))().logits(Path(path))
    with np.load(inputs) as file, torch.no_grad():
        answers = [run(torch.from_numpy(file[name])).float().numpy() for name in file.files]
    np.savez(outputs, *answers)


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    main(*sys.argv[1:])
