# The commands of the documents. Each one sets up what it needs: `make train` works in a fresh clone.

PYTHON     ?= python3
VENV       ?= .venv
VENV_FLAGS ?=
PIP_FLAGS  ?= -c constraints.txt
# Flags of training/train.py beside those of the configuration: make train ARGS="--max_train_steps 100".
CONFIG     ?= training/configs/digits.yaml
ARGS       ?=
# Options of `accelerate launch`, which warns about missing ones and defaults to one thread on a CPU.
# Several GPUs or nodes: make train LAUNCH="--config_file training/launch/FILE.yaml".
THREADS    ?= $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
LAUNCH     ?= --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
              --num_cpu_threads_per_process $(THREADS)
# Comma-separated parts of `make bench` and `make gpu-check`; empty: all.
ONLY       ?=
# `make gpu-check` without a network: a folder of wheels, for the packages that PYTHON lacks (tests/benchmarks/README.md).
WHEELS     ?=
# Test processes.
WORKERS    ?= 2

# `python -m` also finds tools in the system's packages (VENV_FLAGS=--system-site-packages).
RUN       := $(VENV)/bin/python -m
PYTEST    := $(RUN) pytest -q -n $(WORKERS)
# These run again on the joined file that is shipped to the Hub.
JOINED    := $(wildcard tests/test_scheduling_ddpm_notes.py tests/test_pipeline_ddpm_notes.py)
INSTALLED := $(VENV)/.installed
OLDEST    := .venv-oldest
# The wheels are unpacked beside PYTHON's own packages: if PYTHON is that of an environment, a new one would not see them.
UNPACKED  := $(CURDIR)/outputs/gpu-check/packages

.PHONY: help setup setup-oldest train demo test test-all test-oldest bench gpu-check lint clean
.DEFAULT_GOAL := help

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(INSTALLED)  ## create .venv (machine with torch for GPUs: VENV_FLAGS=--system-site-packages PIP_FLAGS=)

# --no-compile: Python compiles what is imported, when it is; compiling every file takes longer than the rest.
$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	@echo "Setting up $(VENV): one to two minutes the first time, silent unless it fails ..."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make setup PYTHON=...")'
	@test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	@$(RUN) pip install -qq --disable-pip-version-check --no-compile $(PIP_FLAGS) -e ".[train,mnist,eval,demo,test]"
	@touch $@
	@echo "$(VENV) is ready."

train: $(INSTALLED)  ## train on the embedded digits (CONFIG=FILE.yaml ARGS="flags of training/train.py")
	$(RUN) accelerate.commands.launch $(LAUNCH) training/train.py --config $(CONFIG) $(ARGS)

demo: $(INSTALLED)  ## show models in the browser: the clone's, or MODEL_ID=outputs/digits
	OPEN_BROWSER=1 $(VENV)/bin/python examples/space/app.py

test: $(INSTALLED)  ## run the quick tests, then those of the joined file
	$(PYTEST) -m "not slow"
	$(if $(JOINED),DDPM_NOTES_JOINED=1 $(PYTEST) -m "not slow" $(JOINED))

test-all: $(INSTALLED)  ## run all tests, slow ones included
	$(PYTEST)
	$(if $(JOINED),DDPM_NOTES_JOINED=1 $(PYTEST) $(JOINED))

# PyPI has the oldest torch with CUDA only: 2.5 GB to download, 5 GB on disk. It runs on CPUs too.
# Not the joined file again: it is the same code.
test-oldest: setup-oldest  ## run the quick tests with the oldest versions that setup.cfg allows, in .venv-oldest
	$(MAKE) test JOINED= VENV=$(OLDEST)

setup-oldest:
	@mkdir -p $(OLDEST)
	@$(PYTHON) tests/support/oldest.py > $(OLDEST)/constraints.txt
	@$(MAKE) --no-print-directory setup VENV=$(OLDEST) VENV_FLAGS= PIP_FLAGS="-c $(OLDEST)/constraints.txt"

bench: $(INSTALLED)  ## measure speed beside the peers: about 25 minutes (ONLY=step,terms ARGS="--clock cpu")
	$(VENV)/bin/python tests/benchmarks/run.py --only "$(ONLY)" $(ARGS)

gpu-check: $(if $(WHEELS),,$(INSTALLED))  ## show what only a GPU can: at most 8 minutes (no network: WHEELS=FOLDER)
	$(if $(WHEELS),$(PYTHON) -m pip install -qq --no-index --no-deps --upgrade --target $(UNPACKED) $(WHEELS)/*.whl)
	$(if $(WHEELS),PYTHONPATH=$(UNPACKED)$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON),$(VENV)/bin/python) tests/benchmarks/gpu_check.py --only "$(ONLY)" $(ARGS)

lint: $(INSTALLED)  ## run ruff and mypy
	$(RUN) ruff check .
	$(RUN) mypy

clean:  ## remove caches and build leftovers; keep the environments and outputs/
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -path "./.venv*" -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
