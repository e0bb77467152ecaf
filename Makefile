# Everything here sets itself up: Python 3.11, a C++ compiler and a package registry are all it takes.
# `make help` lists the targets.

PYTHON ?= python3
VENV ?= .venv
PROFILE ?= full
TRITON = 3.6.0
BIN = $(VENV)/bin
export OMP_NUM_THREADS = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: help install demo curriculum test checks bench bench-gpu bench-gpu-step test-gpu clean

help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(VENV)/installed  ## the virtual environment with everything in it

# torch first and pinned: anything else that wants torch then finds it, and brings no other build. A CUDA build brings
# its own Triton, which must not be replaced; beside a CPU build it interprets and compiles the kernels for the tests.
$(VENV)/installed: setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/python -m pip install --quiet --no-deps triton==$(TRITON)
	@touch $@

demo: install  ## real clips to a trained, exported mini Keye on two ranks; PROFILE=short for a quick look
	$(BIN)/python tools/demo.py --profile $(PROFILE)

test: install  ## every test that this machine can run (about 45 minutes)
	$(BIN)/python -m pytest -q

checks: install  ## style, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy megatron_keye kernels/keye_kernels data_pipeline/keye_data

curriculum: demo/shards/videos  ## every phase after the one before it on the mini model; the same command goes on
	$(BIN)/python -m megatron_keye.curriculum recipes/curriculum.yaml profile=mini

demo/shards/videos: | install
	$(BIN)/python tools/fetch_samples.py --out demo/samples
	for kind in pictures text videos; do \
	    test -d demo/shards/$$kind || $(BIN)/python tools/build_shards.py demo/samples/source/$$kind.jsonl --out demo/shards/$$kind || exit 1; \
	done

bench: install  ## CPU benchmarks of operators and data; results in */benchmarks/results
	$(BIN)/python kernels/benchmarks/bench_cpu.py
	$(BIN)/python data_pipeline/benchmarks/bench_data.py

# torch and triton are all it takes: whatever Python has them, the environment of `make install` if it is there
bench-gpu:  ## GPU benchmarks, correctness first, 8 minutes; results in kernels/benchmarks/results
	$(firstword $(wildcard $(BIN)/python) $(PYTHON)) kernels/benchmarks/bench_gpu.py

# torch, triton and Megatron-Core are all it takes; without a CUDA device one line says so, and the exit code is 2
bench-gpu-step:  ## training steps of a full-width slice on one GPU, beside the plan and published figures
	$(firstword $(wildcard $(BIN)/python) $(PYTHON)) tools/bench_gpu_step.py

test-gpu: install  ## what needs a GPU: every recipe's mini profile against the CPU; skips itself where there is none
	$(BIN)/python -m pytest -q -m gpu -rs tests

clean:  ## remove what the demo made
	rm -rf demo runs
