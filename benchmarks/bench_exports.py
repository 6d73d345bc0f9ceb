"""Exported SmolLM2 in the foreign tools: logits against ours, sizes against the plan's.

Plans come from one profile of the linear layers, solved for every runtime. A target whose tool is
not installed here runs in the environment that ``--python TARGET=INTERPRETER`` names, or is written
and read back only. With ``--llama-bin``, a folder of llama.cpp's programs, it also compares the
perplexity of our files with that of llama.cpp's own quantizations of the same size. Every row is
kept in ``WORK/exported/*.row.json`` when it is done, so a killed benchmark goes on.
Writes ``results/exports.{json,md}``.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

from safetensors import safe_open

from bitplan._base.files import write_json
from bitplan._base.progress import Reporter
from bitplan.benchmarks.common import write_results
from bitplan.exporters.export import Exported, export
from bitplan.exporters.layouts import gguf as gguf_file
from bitplan.exporters.targets import EXPORTERS, Exporter, find, shown_name
from bitplan.exporters.verify import Comparison, compare, verify, weight_error
from bitplan.jobs.folder import RunFolder
from bitplan.jobs.search import run_profile
from bitplan.jobs.settings import ProfileSettings
from bitplan.models.load import load_model, smollm2_path
from bitplan.models.samples import evaluation_samples
from bitplan.models.workload import LoadedModel
from bitplan.quantizers.runtimes import Rules
from bitplan.search.limits import Limits
from bitplan.search.plan import Plan
from bitplan.search.solve import solve

RUNTIMES = ("llama.cpp", "transformers", "vllm-cpu", "mlx", "onnx", "autoround", "gptq")
BUDGETS = ("4.3bpw", "3.3bpw")
OWN = ("IQ4_XS", "Q3_K_M")  # llama.cpp's, to compare with at equal size
# The weights of the default model come from Q4_1, so that type would reproduce them.
LOSSLESS = {"*": ("q4_1", "q5_1")}
TOKENS = 512
MOST_KL = 1e-4  # nats per token
MOST_BYTES = 0.01  # of the plan's
# Plans without a choice, whose KL in llama.cpp is its arithmetic: pins, by what they are called.
UNIFORM = {
    "every matrix Q8_0": {"*": "int8-g32"},
    "every matrix Q4_0": {"*": "int4-g32"},
    "Q4_K where rows are whole blocks, else Q4_0": {"*": "int4-g32", "*down_proj": "q4_k"},
}
# A process of any environment that says which version of a module's distribution it has.
VERSION = (
    "import sys; from importlib.metadata import packages_distributions as d, version as v; "
    "name = d()[sys.argv[1]][0]; print(name, v(name))"
)

Row = dict[str, Any]


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
    parser.add_argument("--kept", action="store_true", help="only write down the rows there are")
    options = parser.parse_args()
    text = options.data / "wikitext-2" / "test.txt"
    pythons = dict(word.split("=", 1) for word in options.python)
    profile = options.profile or profiled(options.work / "exports")
    where = options.work / "exported"
    rows: list[Row] = []
    for name, runtime in cases(options.targets):
        for budget in BUDGETS:
            python = pythons.get(shown_name(name)) or pythons.get(runtime)
            file = where / f"{name}-{runtime}-{budget}.row.json"
            if options.kept and not file.is_file():
                rows.append(empty(name, runtime, budget) | {"note": "not run"})
                continue
            new = partial(row, name, runtime, budget, profile, where, text, python)
            rows.append(kept(file, new))
    if options.targets:
        return
    arithmetic = list(arithmetic_of_llama_cpp(where, profile, text))
    tables = {"llama.cpp's arithmetic": arithmetic}
    if options.llama_bin:
        tables["Perplexity in llama.cpp at equal size"] = list(
            perplexities(options.llama_bin, options.work, profile, text, options.chunks)
        )
    uniform = [found["kl"] for found in arithmetic if found["file"] in UNIFORM]
    noisy = [name for name in EXPORTERS.names() if EXPORTERS.get(name).noise]
    write_results(
        "exports",
        "Exports: SmolLM2-135M in the foreign tools",
        rows=[judged(found, uniform) for found in rows],
        tables=tables,
        notes=[
            f"kl is that of the tool's logits from our dequantized model's, on {TOKENS} tokens of "
            f"WikiText-2, and kl_limit {MOST_KL:g} or, for llama.cpp, the most that a uniform plan "
            "measures there, where no choice of ours plays a part. weight_error compares the "
            "weights the file means with ours, largest difference over largest weight. "
            "stored_over_plan is the size of the planned matrices in the file over the plan's "
            "bytes; unquantized_mb are the tensors that the plan leaves as they are, other_mb is "
            "all that is no tensor: tokenizer, configuration, graph. reached means kl within its "
            f"limit and stored_over_plan within {MOST_BYTES:.0%} of 1.",
            "llama.cpp rounds activations to 8 bits before it multiplies with a quantized matrix, "
            "and not before it multiplies with float32: the same weights as F32 show everything "
            "else. With types of 256 weights (Q4_K, IQ4_XS, ...) it rounds 256 activations by one "
            "scale, with types of 32 (Q4_0, Q8_0) 32: the plans here have both.",
            "Perplexity is llama.cpp's, on the same chunks of 512 tokens of WikiText-2. The "
            "default model comes as Q4_1, which would give its weights back exactly: our plans of "
            "that table may not use it or Q5_1.",
            *(f"{shown_name(name)}: {EXPORTERS.get(name).noise}." for name in noisy),
        ],
        command=recorded(options),
    )


def cases(only: str | None) -> Iterator[tuple[str, str]]:
    """Targets with a checkpoint, and the runtimes of ours that read it."""
    for name in only.split(",") if only else EXPORTERS.names():
        exporter = EXPORTERS.get(name)
        for runtime in exporter.runtimes if exporter.form else ():
            if runtime in RUNTIMES:
                yield name, runtime


def kept(path: Path, make: Callable[[], Row]) -> Row:
    """A row, from its file if it was made before."""
    if not path.is_file():
        made = make()
        print(made, flush=True)
        write_json(path, made)
    found: Row = json.loads(path.read_text())
    return found


def judged(row: Row, uniform: list[float]) -> Row:
    """A row with what its KL may be and whether it reached that."""
    limit = max([MOST_KL, *uniform]) if row["target"] == "gguf" else MOST_KL
    reached = "not run"
    if row["kl"] is not None:
        fits = row["kl"] <= limit and abs(row["stored_over_plan"] - 1) <= MOST_BYTES
        reached = "yes" if fits else "no"
    elif row["bpw"] is None and row["note"] != "not run":
        reached = "no such plan"
    note = row.pop("note")
    return row | {"kl_limit": limit, "reached": reached, "note": note}


def recorded(options: argparse.Namespace) -> str:
    """The command, without this machine's paths."""
    words = ["python benchmarks/bench_exports.py --data DATA --work WORK"]
    words += ["--profile PROFILE"] if options.profile else []
    words += [f"--llama-bin DIR --chunks {options.chunks}"] if options.llama_bin else []
    words += [f"--python {word.split('=')[0]}=INTERPRETER" for word in options.python]
    words += ["--kept"] if options.kept else []
    return " ".join(words)


def profiled(run: Path) -> Path:
    """One profile of the linear layers in every format that a runtime here has a use for."""
    names = [c for r in RUNTIMES for c in Rules.load(r).candidates if c != "keep"]
    settings = ProfileSettings(
        "smollm2",
        formats=(*dict.fromkeys(names), "bf16"),
        rounding="rtn",  # as the figures were made: what is compared is the tools' logits
        sequences=32,
        exclude=("*embed*",),
    )
    run_profile(settings, run, Reporter())
    return RunFolder(run).profile


@cache
def smollm2() -> LoadedModel:
    """The model, loaded when the first row needs it."""
    return load_model("smollm2", "cpu")


def empty(name: str, runtime: str, budget: str) -> Row:
    """A row without figures."""
    keys = ("bpw", "plan_mb", "stored_over_plan", "unquantized_mb", "other_mb", "weight_error")
    figures = dict.fromkeys((*keys, "kl", "logit_error", "same_top1", "tool", "note"))
    return {"target": shown_name(name), "runtime": runtime, "budget": budget} | figures


def row(
    name: str,
    runtime: str,
    budget: str,
    profile: Path,
    folder: Path,
    text: Path,
    python: str | None,
) -> Row:
    """Solve, export, read back, run."""
    result = empty(name, runtime, budget)
    exporter = EXPORTERS.get(name)()
    try:
        plan = solve(profile, budget, limits=Limits(rules=Rules.load(runtime)))
    except ValueError as error:
        return result | {"note": str(error).split(". ")[0]}
    out = folder / f"{name}-{runtime}-{budget}{exporter.suffix}"
    done = export(plan, shown_name(name), out, runtime=runtime, model=smollm2())
    assert done.stored is not None
    tensors = tensor_bytes(out)
    result |= {
        "bpw": plan.bpw,
        "plan_mb": plan.bytes / 1e6,
        "stored_over_plan": done.stored / plan.bytes,
        "unquantized_mb": (tensors - done.stored) / 1e6,
        "other_mb": (done.size - tensors) / 1e6,
        "weight_error": weight_error(exporter, done.source, out),
    }
    if python is None and not exporter.installed():
        return result | {"note": f"not run: {exporter.module} is not installed"}
    return result | compared(done, exporter, text, python)


def compared(done: Exported, exporter: Exporter, text: Path, python: str | None) -> Row:
    """The tool's logits against ours."""
    try:
        found = verify(done, str(text), TOKENS, python)
    except (ValueError, ImportError, RuntimeError) as error:
        return {"note": f"not run: {type(error).__name__}: {str(error)[:200]}"}
    words = [python or sys.executable, "-c", VERSION, str(exporter.module)]
    tool = subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()
    return figures(found) | {"tool": tool}


def figures(found: Comparison) -> Row:
    """What a comparison is reported by."""
    return {"kl": found.kl, "logit_error": found.relative, "same_top1": found.top1}


def tensor_bytes(path: Path) -> int:
    """Bytes of all tensors in an exported file or folder."""
    if path.suffix == ".gguf":
        return sum(int(tensor.n_bytes) for tensor in gguf_file.open_reader(path).tensors)
    if (path / "model.onnx").is_file():
        import onnx_ir

        graph = onnx_ir.load(path / "model.onnx").graph
        values = [value.const_value for value in graph.initializers.values()]
        return sum(tensor.nbytes for tensor in values if tensor is not None)
    total = 0
    for file in path.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            total += sum(opened.get_tensor(name).nbytes for name in opened.keys())  # noqa: SIM118
    return total


def arithmetic_of_llama_cpp(folder: Path, profile: Path, text: Path) -> Iterator[Row]:
    """What of a GGUF file's KL is llama.cpp's rounding of activations.

    Uniform plans show the rounding without any choice of ours; the mixed file with its weights as
    float32, which llama.cpp does not round activations for, shows everything else.
    """
    gguf = find("gguf")[1]
    if not gguf.installed():
        return
    rules = Rules.load("llama.cpp")

    def made(what: str, pins: dict[str, str], budget: str, as_float: bool) -> Row:
        plan = solve(profile, budget, limits=Limits(rules=rules, pins=pins))
        file = folder / "arithmetic.gguf"
        file.unlink(missing_ok=True)
        done = export(plan, "gguf", file, model=smollm2())
        if as_float:
            as_floats(file, folder / "arithmetic-F32.gguf")
            file = folder / "arithmetic-F32.gguf"
        samples = evaluation_samples(smollm2(), str(text), TOKENS, 128)
        found = compare(done.source.logits, gguf.logits(file), samples.batches, gguf.max_kl)
        return {"file": what, "plan_bpw": plan.bpw} | figures(found)

    for i, (what, pins) in enumerate(UNIFORM.items()):
        yield kept(folder / f"uniform-{i}.row.json", partial(made, what, pins, "9bpw", False))
    what = f"the mixed file of {BUDGETS[0]}, its weights as F32"
    yield kept(folder / "mixed-F32.row.json", partial(made, what, {}, BUDGETS[0], True))


def perplexities(
    programs: Path, work: Path, profile: Path, text: Path, chunks: int
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
        ours = work / f"bitplan-{kind}.gguf"
        if not ours.is_file():
            limits = Limits(rules=Rules.load("llama.cpp"), bans=LOSSLESS)
            plan: Plan = solve(profile, f"{size}B", limits=limits)
            export(plan, find("gguf")[0], ours, model=smollm2())
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
