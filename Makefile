# make install   the environment, in .venv            make train   train on real text, on whatever this machine has
# make test      the tests (CPU, gloo); with ARGS=--thorough those of CI, with ARGS=--exhaustive all
# make check     lint and types
# make drill     a hundred random faults in one run, against a run that was left alone; half an hour on two cores
# make parity    every layout against one process, two hours on two cores; writes docs/COMPOSES.md
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export OMP_NUM_THREADS ?= 1
# One process per GPU that torch will see; without one, two gloo ranks. MIG slices are indented lines; -1 hides all GPUs.
GPUS := $(shell n=$$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU '); \
	[ "$$n" -gt 0 ] && [ -n "$${CUDA_VISIBLE_DEVICES+set}" ] \
	&& n=$$(echo "$$CUDA_VISIBLE_DEVICES" | tr ',' '\n' | grep -c '^ *[0-9A-Z]'); echo $$n)
NPROC ?= $(if $(filter 0,$(GPUS)),2,$(GPUS))
EXP ?= $(if $(filter 0,$(GPUS)),stdlib,stdlib_gpu)
RUN ?= runs/$(EXP)-$(shell date +%Y%m%d-%H%M%S)
# Eight sequences per GPU and micro-batch, 64 or a little more per step: divides for every number of GPUs.
BATCH := $(if $(filter stdlib_gpu,$(EXP)),train.global_batch_size=$(shell n=$(NPROC); echo $$(( 8 * n * ((8 + n - 1) / n) ))))
ARGS ?=
# Ranks of one test spend half of their time waiting for each other: two files of tests at a time.
TESTS_AT_A_TIME ?= 2

.PHONY: install train test drill parity check lint types clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Lattice needs Python 3.11 or newer; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

train: install
	$(BIN)/torchrun --standalone --nproc-per-node $(NPROC) launch/train.py +exp=$(EXP) run.dir=$(RUN) $(BATCH) $(ARGS)

test: install
	$(BIN)/python -m pytest --numprocesses $(TESTS_AT_A_TIME) --dist loadfile $(ARGS)

drill: install
	$(BIN)/python launch/drill.py --faults 100 --seed $(shell date +%Y%m%d) --dir runs/drill-$(shell date +%Y%m%d-%H%M%S) $(ARGS)

parity: install
	$(BIN)/python -m tests.parity.compose $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

check: lint types

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
