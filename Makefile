# The commands of the README. Each one sets up what it needs: `make train` in a fresh clone just works.

PYTHON     ?= python3
VENV       ?= .venv
VENV_FLAGS ?=
PIP_FLAGS  ?= -c constraints.txt
# `make train ARGS="--max_train_steps 100"`: options of training/train.py, after those of the configuration file.
CONFIG     ?= training/configs/digits.yaml
ARGS       ?=
# Options of `accelerate launch`, each one given: it warns about the ones it has to fill in, and on a CPU it fills in
# one thread. Several GPUs or nodes: make train LAUNCH="--config_file training/launch/FILE.yaml".
THREADS    ?= $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
LAUNCH     ?= --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
              --num_cpu_threads_per_process $(THREADS)
# Parts of `make bench`, with commas between them; none: all of them.
ONLY       ?=
# Processes that `make test` spreads the tests over.
WORKERS    ?= 2

# `python -m` finds a tool in the system's packages too (VENV_FLAGS=--system-site-packages), where .venv/bin may not.
RUN       := $(VENV)/bin/python -m
PYTEST    := $(RUN) pytest -q -n $(WORKERS)
# These files run a second time, against the single joined file that is shipped to the Hub.
JOINED    := $(wildcard tests/test_scheduling_ddpm_notes.py tests/test_pipeline_ddpm_notes.py)
INSTALLED := $(VENV)/.installed
OLDEST    := .venv-oldest

.PHONY: help setup train demo test test-all test-oldest bench lint clean
.DEFAULT_GOAL := help

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(INSTALLED)  ## make the environment in .venv (GPU box with torch: VENV_FLAGS=--system-site-packages PIP_FLAGS=)

$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	@echo "Setting up $(VENV): one to two minutes the first time, silent unless it fails ..."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make setup PYTHON=...")'
	@test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	@$(RUN) pip install -qq --disable-pip-version-check $(PIP_FLAGS) -e ".[train,mnist,eval,demo,test]"
	@touch $@
	@echo "$(VENV) is ready."

train: $(INSTALLED)  ## train on the embedded digits (CONFIG=FILE.yaml, ARGS="options of training/train.py")
	$(RUN) accelerate.commands.launch $(LAUNCH) training/train.py --config $(CONFIG) $(ARGS)

demo: $(INSTALLED)  ## a model in the browser: the one that comes with the clone (MODEL_ID=outputs/digits)
	OPEN_BROWSER=1 $(VENV)/bin/python examples/space/app.py

test: $(INSTALLED)  ## the quick tests, then those of the joined file
	$(PYTEST) -m "not slow"
	$(if $(JOINED),DDPM_NOTES_JOINED=1 $(PYTEST) -m "not slow" $(JOINED))

test-all: $(INSTALLED)  ## every test, the slow ones too
	$(PYTEST)
	$(if $(JOINED),DDPM_NOTES_JOINED=1 $(PYTEST) $(JOINED))

# The oldest torch is on PyPI with CUDA only: a download of 2.5 GB, and 5 GB of disk, which CPUs run as well.
test-oldest:  ## the quick tests with the oldest versions that setup.cfg allows, in .venv-oldest
	@mkdir -p $(OLDEST)
	@$(PYTHON) tests/support/oldest.py > $(OLDEST)/constraints.txt
	$(MAKE) test VENV=$(OLDEST) VENV_FLAGS= PIP_FLAGS="-c $(OLDEST)/constraints.txt"

bench: $(INSTALLED)  ## the project beside its peers, in one table: 25 minutes (ONLY=step,terms ARGS="--clock cpu")
	$(VENV)/bin/python tests/benchmarks/run.py --only "$(ONLY)" $(ARGS)

lint: $(INSTALLED)  ## ruff and mypy
	$(RUN) ruff check .
	$(RUN) mypy

clean:  ## remove caches and build leftovers; the environment and outputs/ stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -path "./.venv*" -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
