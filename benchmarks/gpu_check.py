"""Everything that only a GPU can show: results, speed, memory; one file of figures, one page.

    PYTHONPATH=.typing python benchmarks/gpu_check.py --out gpu.json --minutes 5

A section that fails says why, in the file and in the output, and the others go on.  The file is
written after every section and while one runs; whoever stops the script loses nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ["BITPLAN_KERNEL"] = "triton"

import torch
import triton

from bitplan.benchmarks import (
    gpu_cases,
    gpu_compile,
    gpu_llama,
    gpu_profile,
    gpu_report,
    gpu_timing,
)
from bitplan.benchmarks.common import origin
from bitplan.kernels.triton_launch import INTERPRETED, Launch
from bitplan.kernels.tune import processors

TINY = ((128, 256),)
PLANS = {
    "int4": ("int4-g128-asym",),
    "3, 4 and 5 bits": ("int3-g128-asym", "int4-g128-asym", "int5-g128-asym"),
}


class Check:
    """What the sections share.

    Attributes:
        tiny: Whether all shapes are tiny, for a machine without a GPU.
        seed: Of everything random.
        device: Where kernels run.
        cache: Bytes of its last cache.
        bandwidth: Bytes per second of a copy, once measured.
        found: What is written.
    """

    def __init__(self, out: Path, minutes: float, tiny: bool, seed: int) -> None:
        self.out, self.tiny, self.seed = out, tiny, seed
        self.end = time.monotonic() + 60 * minutes
        self.device = torch.device(
            "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
        )
        self.cache, self.bandwidth = 1 << 12, 1e9
        about: dict[str, Any] = {
            "seed": seed,
            "torch": torch.__version__,
            "triton": triton.__version__,
            "python": sys.version.split()[0],
            "tiny": tiny,
            "device": "interpreter",
            "commit": origin()["commit"],
        }
        if self.device.type == "cuda":
            facts = torch.cuda.get_device_properties(0)
            self.cache = int(facts.L2_cache_size)
            about |= {
                "device": facts.name,
                "memory_gb": facts.total_memory / 1e9,
                "processors": facts.multi_processor_count,
                "cache_mb": facts.L2_cache_size / 1e6,
                "cuda": torch.version.cuda,
            }
        self.found: dict[str, Any] = {"about": about, "sections": {}}
        self.section: dict[str, Any] = {}
        self.section_end = self.end

    @property
    def count(self) -> int:
        """Multiprocessors."""
        return processors(0 if self.device.type == "cuda" else -1)

    def left(self) -> float:
        """Seconds until this section has to stop."""
        return min(self.section_end, self.end) - time.monotonic()

    def note(self, text: str) -> None:
        """Keep and print a remark of a section."""
        self.section.setdefault("notes", []).append(text)
        print(f"  {text}", flush=True)

    def rows(self, name: str = "rows") -> list[dict[str, Any]]:
        """A table of this section."""
        found: list[dict[str, Any]] = self.section.setdefault(name, [])
        return found

    def save(self) -> None:
        """Write what there is, atomically."""
        temporary = self.out.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.found, indent=1))
        temporary.replace(self.out)

    def run(self, name: str, section: Callable[[Check], None], seconds: float) -> None:
        """Run a section, whatever it does."""
        self.section = {"status": "running"}
        self.found["sections"][name] = self.section
        start = time.monotonic()
        self.section_end = start + seconds
        print(f"{name} ...", flush=True)
        if self.end - start < 2:
            self.section["status"] = "no time left"
        else:
            try:
                section(self)
                self.section["status"] = self.section.pop("verdict", "done")
            except BaseException as error:
                self.section["status"] = "failed"
                self.section["traceback"] = traceback.format_exc()
                print(traceback.format_exc(), flush=True)
                if isinstance(error, KeyboardInterrupt):
                    raise
        self.section["seconds"] = time.monotonic() - start
        print(f"  {self.section['status']}, {self.section['seconds']:.1f} s", flush=True)
        self.save()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def compile_kernels(check: Check) -> None:
    """Compile what the other sections launch, on all cores."""
    cases = gpu_cases.cases()
    for weight in [gpu_cases.uniform(bits) for bits in SWEPT]:
        for m in (1, 16):
            some = [Launch(*way) for way in gpu_timing.sweep_of(m, (1, 2))]
            cases += [
                gpu_cases.Case(weight, gpu_cases.WHOLE, torch.bfloat16, m, launch=launch)
                for launch in some
            ]
    capability, count, workers = 90, 132, min(16, os.cpu_count() or 1)
    if check.device.type == "cuda":
        major, minor = torch.cuda.get_device_capability()
        capability, count = 10 * major + minor, check.count
    if check.tiny:
        cases, workers = cases[:1], 1
    rows = check.rows()
    for done in gpu_compile.compile_all(cases, capability, count, workers, check.left):
        rows.append({"case": done.name, "seconds": done.seconds, "shared": done.shared_bytes})
        if done.error:
            rows[-1]["error"] = done.error
            check.note(f"{done.name}: {done.error}")
    if any("error" in row for row in rows):
        check.section["verdict"] = "failed"


@torch.inference_mode()
def correctness(check: Check) -> None:
    """Every kernel against float64 products of what torch decodes."""
    rows, failed, skipped = check.rows(), 0, 0
    warnings.simplefilter("ignore")
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what is empty with NaN
    try:
        for i, (weight, shape, some) in enumerate(gpu_cases.by_group(gpu_cases.cases(check.tiny))):
            if check.left() < 1:
                skipped += len(some)
                continue
            built = gpu_cases.build(weight, shape, check.device, check.seed + 1000 * i)
            for j, case in enumerate(some):
                seed = check.seed + 1000 * i + j
                row: dict[str, Any] = {"case": case.name}
                rows.append(row)
                try:
                    parts = gpu_cases.operands(case, built, check.device, seed)
                    found = gpu_cases.product(case, built, *parts[:3], check.count)
                    exact = gpu_cases.expected(case, built, parts[0], parts[1], parts[3])
                    row["error"] = gpu_cases.error_of(found, exact)
                    row["bound"] = gpu_cases.bound(case, found.dtype, INTERPRETED)
                    good = row["error"] <= row["bound"]
                except Exception as error:
                    row["failure"] = f"{type(error).__name__}: {error}"[:500]
                    good = False
                if not good:
                    failed += 1
                    check.note(f"WRONG {row}")
    finally:
        torch.use_deterministic_algorithms(False)
    by: dict[float, float] = {}
    for row in rows:
        if "error" in row:
            by[row["bound"]] = max(by.get(row["bound"], 0.0), row["error"])
    check.section["worst"] = {f"bound {bound:g}": error for bound, error in by.items()}
    check.section |= {"checks": len(rows), "wrong": failed, "skipped": skipped}
    check.section["verdict"] = "failed" if failed or not rows else "done"


def copy(check: Check) -> None:
    """The bandwidth that percentages are of."""
    size = 1 << (16 if check.tiny else 31)
    check.section |= gpu_timing.copy_bandwidth(check.device, size)
    check.bandwidth = check.section["bytes_per_s"]


@torch.inference_mode()
def decode(check: Check) -> None:
    """Few vectors at a time."""
    _race(check, (1,) if check.tiny else gpu_timing.DECODE, gpu_timing.MOST_COPIES)
    if not check.tiny:  # 8 bits take two multiplications in bfloat16, not in float16
        for weight in map(gpu_cases.uniform, gpu_cases.WIDTHS):
            if check.left() < 1:
                return
            rival = gpu_timing.packed_rival(weight, (8192, 8192), check.device, check.cache, 1)
            some = gpu_timing.race(
                (8192, 8192), (1, 16), iter([rival]), check.device, check.bandwidth, torch.float16
            )
            check.rows("float16").extend(some)


@torch.inference_mode()
def prefill(check: Check) -> None:
    """Many vectors at a time: weights are dequantized on the way."""
    _race(check, (70,) if check.tiny else gpu_timing.PREFILL, 2)


def _race(check: Check, tokens: Sequence[int], most: int) -> None:
    for shape in TINY if check.tiny else gpu_timing.MATRICES:
        contenders = gpu_timing.rivals(
            shape, check.device, check.cache, check.seed, check.note, short=check.tiny
        )
        if most < gpu_timing.MOST_COPIES:
            contenders = (r for r in contenders if "int4 (" not in r.name)
        for row in gpu_timing.race(
            shape, tokens, contenders, check.device, check.bandwidth, most=most
        ):
            check.rows().append(row)
            if check.left() < 0:
                check.note(f"stopped at {row['kernel']}, {shape}: no time left")
                return
        check.save()


def model_1b(check: Check) -> None:
    """Tokens per second of a small Llama."""
    _models(check, gpu_llama.LLAMA_1B)


def model_8b(check: Check) -> None:
    """Tokens per second of a larger one."""
    _models(check, gpu_llama.LLAMA_8B)


def _models(check: Check, config: gpu_llama.Config) -> None:
    device = check.device
    config = gpu_llama.TINY if check.tiny else config
    length, prompt = (16, 8) if check.tiny else (512, 1024)
    for name, plan in {"bf16": (), **PLANS}.items():
        if check.left() < 0:
            check.note(f"{name}: no time left")
            return
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        if plan:
            model = gpu_llama.packed_llama(config, device, torch.bfloat16, check.seed, plan)
        else:
            model = gpu_llama.plain_llama(config, device, torch.bfloat16, check.seed)
        built, most = time.perf_counter() - start, 0.0
        if device.type == "cuda":
            most = torch.cuda.max_memory_allocated() / 1e9
            torch.cuda.reset_peak_memory_stats()
        batches = (1,) if check.tiny else (1, 16)
        for row in gpu_llama.speeds(model, device, batches, length, prompt):
            check.rows().append({"model": name, **row})
            if not row.get("finite", True):
                check.note(f"{name}: logits are not finite")
        memory = {"model": name, "build_s": built, "weights_gb": gpu_llama.resident(model) / 1e9}
        if device.type == "cuda":
            memory["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
            memory["build_peak_gb"] = most
        check.rows("memory").append(memory)
        check.save()
        del model


def profile(check: Check) -> None:
    """Prices of a Llama's weights, against a pass forward and back."""
    config = gpu_llama.TINY if check.tiny else gpu_llama.LLAMA_1B
    sizes = (2, 8, 1) if check.tiny else (16, 512, 4)
    check.section |= gpu_profile.profile_times(config, check.device, check.seed, *sizes)


def refit(check: Check) -> None:
    """A device file of the decode timings."""
    from bitplan.kernels.lab.bench import Row, errors_of
    from bitplan.kernels.lab.bench import refit as fit_device
    from bitplan.kernels.latency import Device

    name = check.found["about"]["device"]
    timed = check.found["sections"].get("decode", {}).get("rows", [])
    rows = [
        Row(int(r["bits"]), r["m"], r["n"], r["k"], r["us"] / 1e6, 1.0, r["weight_bytes"])
        for r in timed
        if r["kernel"] == "torch bf16" or (r["kernel"].startswith("int") and "+" not in r["kernel"])
    ]
    base = Device.of(name) or Device.load("h100")
    if check.tiny:
        rows = _invented(base)
    slug = "-".join(name.lower().replace("nvidia", "").split()) or "gpu"
    source = f"benchmarks/gpu_check.py on {name}: CUDA graphs, bfloat16, groups of 128"
    fitted = fit_device(base, rows, slug, source).model_copy(update={"description": name})
    path = check.out.with_name(f"{slug}.toml")
    fitted.save(path)
    errors = sorted(abs(error) for error in errors_of(fitted, rows))
    before = sorted(abs(error) for error in errors_of(base, rows))
    check.section |= {
        "file": path.name,
        "timings": len(rows),
        "median_error": errors[len(errors) // 2],
        "largest_error": errors[-1],
        "median_error_before": before[len(before) // 2],
        "toml": path.read_text(),
    }


def _invented(base: Any) -> list[Any]:
    """Timings that a device predicts, to try the fit without a GPU."""
    from bitplan.kernels.lab.bench import Row
    from bitplan.quantizers.format import Format

    rows = []
    for bits in (1, 2, 3, 4, 5, 6, 7, 8, 16):
        fmt = Format.parse(f"int{bits}-g128-asym" if bits < 16 else "bf16")
        for m, (n, k) in ((1, (4096, 4096)), (16, (8192, 8192)), (64, (4096, 14336))):
            size = fmt.stored_bytes((n, k))
            seconds = 1.2 * base.seconds(fmt, (n, k), m, weight_bytes=size)
            rows.append(Row(bits, m, n, k, seconds, 1.0, size))
    return rows


SWEPT = (4, 3)


@torch.inference_mode()
def sweep(check: Check) -> None:
    """Ways to launch against the rule's."""
    for bits in SWEPT:
        for shape in TINY if check.tiny else ((4096, 4096), (4096, 14336)):
            for m in (1, 16):
                if check.left() < 3:
                    check.note("no time left")
                    return
                weight = gpu_cases.uniform(bits)
                check.rows().extend(
                    gpu_timing.sweep_launches(
                        weight, shape, m, check.device, check.cache, check.count
                    )
                )


SECTIONS: dict[str, tuple[Callable[[Check], None], float]] = {  # and the most seconds of each
    "compile": (compile_kernels, 120),
    "correctness": (correctness, 100),
    "copy": (copy, 10),
    "decode": (decode, 100),
    "prefill": (prefill, 45),
    "model-1b": (model_1b, 50),
    "model-8b": (model_8b, 80),
    "profile": (profile, 60),
    "refit": (refit, 30),
    "sweep": (sweep, 60),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sections; 1 if a result was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, comma-separated")
    parser.add_argument("--seed", type=int, default=int(time.time()) % 100000)
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try the script")
    asked = parser.parse_args(arguments)
    only = asked.only.split(",")
    if unknown := [name for name in only if name not in SECTIONS]:
        parser.error(f"no section {unknown[0]!r}: there are {', '.join(SECTIONS)}")
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    check = Check(asked.out, asked.minutes, asked.tiny, asked.seed)
    command = f"python benchmarks/gpu_check.py --seed {asked.seed} --minutes {asked.minutes:g}"
    command += " --tiny" if asked.tiny else ""
    command += f" --only {asked.only}" if only != list(SECTIONS) else ""
    check.found["about"]["command"] = command
    if check.device.type != "cuda" and not INTERPRETED:
        parser.error("there is no GPU; TRITON_INTERPRET=1 with --tiny tries the script without")
    print(json.dumps(check.found["about"]), flush=True)
    for name in (name for name in SECTIONS if name in only):
        check.run(name, *SECTIONS[name])
    print(summary(check.found))
    gpu_report.write_report(check.found, asked.out.with_suffix(".md"))
    wrong = check.found["sections"].get("correctness", {}).get("status", "done") == "failed"
    return int(wrong)


def summary(found: dict[str, Any]) -> str:
    """The figures that matter most."""
    sections = found["sections"]
    lines = [f"{found['about']['device']}, seed {found['about']['seed']}"]
    lines += [f"{name:12} {s['status']:12} {s['seconds']:6.1f} s" for name, s in sections.items()]
    if "checks" in (right := sections.get("correctness", {})):
        lines.append(
            f"{right['checks']} checks, {right['wrong']} wrong, {right['skipped']} skipped"
        )
        lines.append(f"largest errors: {right['worst']}")
    if "bytes_per_s" in (moved := sections.get("copy", {})):
        lines.append(f"copy {moved['bytes_per_s'] / 1e12:.3f} TB/s")
    for name in ("decode", "prefill"):
        rows = sections.get(name, {}).get("rows", [])
        tokens = sorted({row["m"] for row in rows})
        lines.append(f"{name}: us in a graph, x bf16, % of memory bound; at {tokens} vectors")
        by: dict[tuple[str, str], list[str]] = {}
        for row in rows:
            key = (f"{row['n']}x{row['k']}", row["kernel"])
            by.setdefault(key, []).append(
                f"{row['us']:8.1f} {row['speedup']:5.2f} {100 * row['of_memory_bound']:3.0f}%"
            )
        lines += [f"{key[0]:11} {key[1][:34]:34} " + " |".join(v) for key, v in by.items()]
    for name in ("model-1b", "model-8b"):
        for row in sections.get(name, {}).get("rows", []):
            graph = row.get("graph_tokens_per_s")  # prompts have none
            speed = f"{'-':>9}" if graph is None else f"{graph:9.1f}"
            lines.append(
                f"{name} {row['model']:16} {row['what']} x{row['batch']:<3} "
                f"{speed} tokens/s in a graph {row['plain_tokens_per_s']:9.1f} plain"
            )
        for row in sections.get(name, {}).get("memory", []):
            lines.append(f"{name} {row}")
    for name in ("profile", "refit"):
        shown = {k: v for k, v in sections.get(name, {}).items() if k not in ("toml", "traceback")}
        lines.append(f"{name} {shown}")
    by_case: dict[str, list[dict[str, Any]]] = {}
    for row in sections.get("sweep", {}).get("rows", []):
        by_case.setdefault(f"{row['kernel']} {row['n']}x{row['k']} m={row['m']}", []).append(row)
    for case, rows in by_case.items():
        best = min(rows, key=lambda row: row["us"])
        ruled = next(row for row in rows if row["by_rule"])
        lines.append(
            f"sweep {case}: rule {ruled['launch']} {ruled['us']:.1f} us, "
            f"best {best['launch']} {best['us']:.1f} us"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
