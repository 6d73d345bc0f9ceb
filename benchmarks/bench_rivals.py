"""Rivals for real: their own programs quantize SmolLM2-135M, and one evaluator measures them all.

Every tool runs in an environment of its own (``--python NAME=INTERPRETER``; llama.cpp's programs in
``--llama-bin``), on the same calibration sequences: as many tokens of WikiText-2's validation part
as a search of bitplan reads. The linear layers of the blocks are quantized, the embedding stays as
it is. What a tool stored is dequantized into the original model and measured on WikiText-2's test
part and on code. A tool that is not given is listed as not run. Everything is kept in ``--work``:
killed at any point, the same command goes on. Writes ``results/rivals.{json,md}`` and
``results/rivals.{png,svg}`` after every rival; bitplan's own figures are those of
``results/rounding.json``.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bitplan._base.files import atomic_path, write_json
from bitplan._base.progress import Reporter
from bitplan.benchmarks.bench_exports import as_floats
from bitplan.benchmarks.common import RESULTS, origin, write_results
from bitplan.benchmarks.rivals_cases import CASES, LLAMA, PYTHONS, Case
from bitplan.benchmarks.rivals_evaluate import Evaluator, Scores, stored_matrices
from bitplan.benchmarks.rivals_layer import compared
from bitplan.benchmarks.rivals_table import Found, draw, notes, ours, table
from bitplan.jobs.folder import RunFolder
from bitplan.jobs.materialize import assignment_formats, planned_units, save_hugging_face_files
from bitplan.jobs.renderings import plan_renderer
from bitplan.models.load import load_model, smollm2_path
from bitplan.models.samples import evaluation_samples
from bitplan.models.workload import LoadedModel
from bitplan.search.plan import Plan

TEXT, CODE = "WikiText-2 test", "code"
LENGTH = 128
CALIBRATION = 96 + 128  # sequences: what a search of bitplan prices with and rounds by
MATRIX, NEW_MATRIX = "imatrix.gguf", "imatrix-new.gguf"
TOOLS = Path(__file__).resolve().parent / "rivals_tools.py"


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds wikitext-2/")
    parser.add_argument("--work", type=Path, default=Path("runs/bench-rivals"))
    parser.add_argument("--python", action="append", default=[], metavar="NAME=INTERPRETER")
    parser.add_argument("--llama-bin", type=Path, help="folder with llama-quantize, llama-imatrix")
    parser.add_argument("--tokens", type=int, default=16384, help="test tokens; a quarter of code")
    parser.add_argument("--only", action="append", help="a tool, or TOOL-SETTING; repeatable")
    parser.add_argument("--run", type=Path, action="append", default=[], help="of bitplan, as well")
    parser.add_argument("--kept", action="store_true", help="only write down what there is")
    parser.add_argument("--out", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    work: Path = options.work.resolve()
    chosen = [case for case in CASES if not options.only or case.among(options.only)]
    if options.kept:
        write(options)
        return
    named = (word.split("=", 1) for word in options.python)
    programs = {name: Path(path).absolute() for name, path in named}
    if options.llama_bin:
        programs[LLAMA] = options.llama_bin.absolute()
    model, reporter = load_model("smollm2", "cpu"), Reporter()
    text = options.data / "wikitext-2"
    prepare(model, text / "valid.txt", work)
    texts = {
        TEXT: evaluation_samples(model, str(text / "test.txt"), options.tokens, LENGTH),
        CODE: evaluation_samples(model, "code", options.tokens // 4, LENGTH),
    }
    layer = work / "layer.json"
    if (program := programs.get("gptqmodel")) and not layer.is_file():
        write_json(layer, compared(model, program, TOOLS, work))
    evaluator: Evaluator | None = None
    for case in chosen:
        row = work / "rows" / f"{case.key}.json"
        if row.is_file():
            continue
        where = programs.get(PYTHONS[case.tool])
        if where is None:
            continue
        print(f"{case.key} ...", flush=True)
        found = quantized(case, where, work)
        if "note" not in found:
            evaluator = evaluator or Evaluator(model, texts, work, reporter)
            found |= measured(case, evaluator, model, work)
        write_json(row, found)
        write(options)
    for run in options.run:
        row = work / "rows" / f"bitplan-{run.name}.json"
        if not row.is_file():
            evaluator = evaluator or Evaluator(model, texts, work, reporter)
            write_json(row, measured_run(run, evaluator, model))
            write(options)
    write(options)


def prepare(model: LoadedModel, text: Path, work: Path) -> None:
    """The original as a folder of transformers and as GGUF, and the calibration sequences."""
    folder = work / "original"
    if not (folder / "model.safetensors").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        save_hugging_face_files(model, folder)
        state = model.module.state_dict()
        state.pop("lm_head.weight")  # tied
        with atomic_path(folder / "model.safetensors") as temporary:
            save_file({k: v.contiguous() for k, v in state.items()}, temporary, {"format": "pt"})
    if not (plain := work / "original-F32.gguf").is_file():
        with atomic_path(plain) as temporary:
            as_floats(smollm2_path(), temporary)
    folder = work / "calibration"
    if not (folder / "text.txt").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer: Any = model.workload.tokenizer
        ids = tokenizer(text.read_text(), add_special_tokens=False, verbose=False)["input_ids"]
        starts = windows(len(ids))
        sequences = torch.tensor([ids[start : start + LENGTH] for start in starts])
        torch.save(sequences, folder / "ids.pt")
        longer = (tokenizer.decode(ids[s : s + LENGTH + 32]) for s in starts)  # never cut short
        (folder / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in longer))
        joined = "".join(tokenizer.decode(row) for row in sequences.tolist())
        (folder / "text.txt").write_text(joined)


def windows(tokens: int, count: int = CALIBRATION, length: int = LENGTH + 32) -> list[int]:
    """Where ``count`` windows of ``length`` start, evenly over a text of so many tokens.

    >>> windows(100, 4, 10)
    [0, 30, 60, 90]
    """
    step = (tokens - length) // (count - 1)
    if step < length:
        raise ValueError(f"{tokens:,} tokens are too few for {count} sequences of {length}.")
    return [i * step for i in range(count)]


def place_of(case: Case, work: Path) -> Path:
    """Where a rival's file or folder is."""
    return work / "quantized" / (f"{case.key}.gguf" if case.tool == LLAMA else case.key)


def quantized(case: Case, program: Path, work: Path) -> dict[str, Any]:
    """Let a rival quantize, unless it has; what it is and took, or a ``note`` why it cannot."""
    out = place_of(case, work)
    out.parent.mkdir(parents=True, exist_ok=True)
    made = out.with_suffix(".made.json") if case.tool == LLAMA else out / "made.json"
    if not made.is_file():
        log = work / "logs" / f"{case.key}.log"
        log.parent.mkdir(exist_ok=True)
        for words in commands(case, program, work, out):
            with log.open("a") as file:
                done = subprocess.run(
                    list(map(str, words)),
                    cwd=log.parent,  # some leave logs of their own where they run
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    check=False,
                )
            if done.returncode:
                return {"note": f"not run: {last_line(log.read_text(errors='replace'))}"}
            if (new := work / NEW_MATRIX).is_file():  # whole: it is also saved on the way
                new.rename(work / MATRIX)
        if case.tool == LLAMA:
            said = re.search(r"version: (\S+)", log.read_text(errors="replace"))
            write_json(made, {"tool": f"{LLAMA} {said[1]}" if said else LLAMA})
    found: dict[str, Any] = json.loads(made.read_text())
    return found


def commands(case: Case, program: Path, work: Path, out: Path) -> list[list[str | Path]]:
    """What is run for a rival, in order."""
    if case.tool != LLAMA:
        settings = json.dumps(case.settings)
        where = (work / "original", work / "calibration", out)
        return [[program, TOOLS, case.tool, *where, settings]]
    matrix, plain = work / MATRIX, work / "original-F32.gguf"
    quantize, text = program / "llama-quantize", work / "calibration" / "text.txt"
    size = ["-c", str(LENGTH), "-b", str(LENGTH), "-t", "1"]
    make: list[str | Path] = [
        program / "llama-imatrix",
        "-m",
        plain,
        "-f",
        text,
        "-o",
        work / NEW_MATRIX,
        *size,
    ]
    embedding = ["--token-embedding-type", "f16"]
    kind = str(case.settings["type"])
    return [
        *([] if matrix.is_file() else [make]),
        [quantize, "--imatrix", matrix, *embedding, plain, out, kind, "1"],
        [quantize, "--allow-requantize", out, out.with_suffix(".floats"), "F32", "1"],
    ]


def last_line(log: str) -> str:
    r"""The last line of a log that says something, shortened; without paths.

    >>> last_line("Traceback ...\nValueError: /a/b/c.py is bad\n\n")
    'ValueError: c.py is bad'
    """
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    words = (lines or ["no message"])[-1].split(" ")
    return " ".join(w.rsplit("/", 1)[-1] if w.startswith("/") else w for w in words)[:200]


def measured(case: Case, evaluator: Evaluator, model: LoadedModel, work: Path) -> dict[str, Any]:
    """Bytes and scores of a rival."""
    place = place_of(case, work)
    floats = place.with_suffix(".floats") if case.tool == LLAMA else None
    sizes: dict[str, int] = {}

    def matrices() -> Any:
        for matrix in stored_matrices(place, model, floats):
            if matrix.name.startswith("model.layers."):
                sizes[matrix.name] = matrix.nbytes
                yield matrix

    scores = evaluator.matrices(matrices(), case.key)
    weights = sum(model.module.get_parameter(f"{name}.weight").numel() for name in sizes)
    everything = sum(
        p.numel() for n, p in model.module.named_parameters() if ".layers." in n and p.dim() == 2
    )
    if weights != everything:
        raise ValueError(f"{place} has {weights:,} of the {everything:,} weights of the blocks.")
    if floats is not None:
        floats.unlink()
    return figures(sum(sizes.values()), weights, scores)


def figures(size: int, weights: int, scores: Mapping[str, Scores]) -> dict[str, Any]:
    """What a row keeps."""
    return {
        "bytes": size,
        "bpw": 8 * size / weights,
        "scores": {name: asdict(score) | {"mean": score.mean} for name, score in scores.items()},
        "origin": origin(),
    }


def measured_run(run: Path, evaluator: Evaluator, model: LoadedModel) -> dict[str, Any]:
    """A plan of bitplan, by the same evaluator."""
    folder = RunFolder(run)
    plan = Plan.load(folder.plan)
    units = planned_units(model.module, plan)
    renderer = plan_renderer(plan, model, units, beside=folder, reporter=Reporter())
    with renderer.applied(assignment_formats(plan)):
        scores = evaluator.run(model.logits, run.name)
    searched = plan.measured.kl if plan.measured else None
    return figures(plan.bytes, plan.weights, scores) | {"tool": "bitplan", "searched": searched}


def write(options: argparse.Namespace) -> None:
    """The page and the picture, from all rows there are."""
    kept = {
        file.stem: json.loads(file.read_text())
        for file in sorted((options.work / "rows").glob("*.json"))
    }
    found = [Found.of(case, kept.get(case.key)) for case in CASES]
    points = ours(RESULTS / "rounding.json")
    checks = [row | {"run": name} for name, row in kept.items() if name.startswith("bitplan-")]
    layer = options.work / "layer.json"
    write_results(
        "rivals",
        "Rivals: SmolLM2-135M quantized by their own programs",
        rows=table(found, points),
        tables={"GPTQ of one layer": json.loads(layer.read_text())} if layer.is_file() else {},
        notes=notes(found, checks, options.tokens, CALIBRATION * LENGTH),
        command=recorded(options),
        out=options.out,
    )
    draw(found, points, options.out / "rivals.png")


def recorded(options: argparse.Namespace) -> str:
    """The command, without this machine's paths."""
    words: Sequence[str] = [
        "python benchmarks/bench_rivals.py --data DATA --work WORK",
        *(f"--python {word.split('=')[0]}=INTERPRETER" for word in options.python),
        *(["--llama-bin DIR"] if options.llama_bin else []),
        *([f"--tokens {options.tokens}"] if options.tokens != 16384 else []),
    ]
    return " ".join(words)


if __name__ == "__main__":
    main()
