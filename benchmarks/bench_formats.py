"""What formats lose of normal weights, and of a block of SmolLM2, against the least possible.

Normal weights are rounded to nearest on scales with the least squared error.  The matrices of a
block are rounded by fisher_gptq, with the second moments of their inputs as the curvature.  Writes
``results/formats.{json,md}``.  Minutes on two cores.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from bitplan.benchmarks.common import RESULTS, Row, write_results
from bitplan.models.load import load_model
from bitplan.models.samples import calibration_samples
from bitplan.models.workload import Batch, LoadedModel
from bitplan.quantizers.format import Format
from bitplan.quantizers.methods import METHODS, Evidence
from bitplan.reports.format_menu import SHOWN, Facts, normal

SHAPE = (4096, 4096)  # that bits are counted for
MATRICES = ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj")
FORMATS = (
    *(f"int{bits}-g64{zero}" for bits in (2, 3, 4) for zero in ("", "-asym")),
    *("nl2-g64", "nl3-g64", "nl4-g64", "vq2-g64", "vq3-g64", "tcq2", "tcq3", "tcq4"),
)

Moments = dict[str, Tensor]  # [cols, cols] by matrix


class _Reached(Exception):
    """The last input that is needed is there."""


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--block", type=int, default=1, help="of SmolLM2")
    parser.add_argument("--sequences", type=int, default=32, help="of 128 tokens")
    parser.add_argument("--out", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    sample = normal()
    found = [Facts.of(Format.parse(name), SHAPE, sample) for name in SHOWN]
    rows = [
        {
            "format": facts.fmt.name,
            "bits per weight": facts.bits,
            "relative squared error": facts.error,
            "x bound": facts.of_bound,
            "CPU": facts.cpu,
            "GPU": facts.gpu,
        }
        for facts in sorted(found, key=lambda facts: facts.bits)
    ]
    note = (
        f"Bits of a matrix {SHAPE[0]} x {SHAPE[1]}; errors of {sample.shape[0]} x "
        f"{sample.shape[1]} normal weights, rounded to nearest on scales with the least squared "
        "error; `x bound` is the error times 4^bits."
    )
    title = "What formats lose of normal weights"
    write_results("formats", title, rows=rows, notes=[note], out=options.out)
    number, sequences = options.block, options.sequences
    also = (
        f"Of the block: {', '.join(MATRICES)}, rounded by fisher_gptq with the second moments of "
        f"their inputs over {sequences} sequences of 128 tokens (prose) as the curvature; errors "
        "are those of the outputs relative to these, on as many other sequences."
    )
    tables = {f"Block {number} of SmolLM2-135M": block(number, sequences)}
    write_results("formats", title, rows=rows, tables=tables, notes=[note, also], out=options.out)


def block(number: int, sequences: int) -> list[Row]:
    """Errors of outputs, relative to them, in every format; the mean over the matrices."""
    model = load_model("smollm2", "cpu")
    name = f"model.layers.{number}."
    layers = {m: model.module.get_submodule(name + m) for m in MATRICES}
    samples = calibration_samples(model, "prose", sequences=2 * sequences, length=128)
    halves = [moments(model, layers, samples.batches[i::2]) for i in (0, 1)]
    rows = []
    for spec in FORMATS:
        fmt, errors, bits, weights = Format.parse(spec), [], 0, 0
        for matrix, layer in layers.items():
            weight = layer.get_parameter("weight").detach().float()
            evidence = Evidence(fisher=halves[0][matrix])
            packed = METHODS.get("fisher_gptq")(weight, fmt, evidence)
            other = halves[1][matrix].double()
            error = packed.dequantize().double() - weight.double()
            errors.append(_cost(error, other) / _cost(weight.double(), other))
            bits, weights = bits + 8 * packed.nbytes, weights + weight.numel()
        bpw, mean = bits / weights, sum(errors) / len(errors)
        rows.append({"format": spec, "bpw": bpw, "error": mean, "x 4^bpw": mean * 4**bpw})
        print(rows[-1], flush=True)
    return sorted(rows, key=lambda row: float(row["bpw"]))


def _cost(error: Tensor, moments: Tensor) -> float:
    return float((error @ moments * error).sum())


def moments(model: LoadedModel, layers: dict[str, nn.Module], batches: Sequence[Batch]) -> Moments:
    """The mean of x x^T over the inputs x of every layer, float32."""
    sums: Moments = {}
    tokens: Counter[str] = Counter()

    def see(name: str, inputs: tuple[Tensor, ...]) -> None:
        flat = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
        sums[name] = flat.T @ flat + sums.get(name, 0)
        tokens[name] += len(flat)
        if name == MATRICES[-1]:
            raise _Reached

    handles = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: see(name, inputs))
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        for batch in batches:
            with suppress(_Reached):
                model.logits(batch)
    for handle in handles:
        handle.remove()
    return {name: total / tokens[name] for name, total in sums.items()}


if __name__ == "__main__":
    main()
