# make example   trains a federated classifier and draws its curves
# make test      lint, types, and the tests for every change
# make test-all  lint, types, and every test: what CI runs
# make durations the processor seconds of every test, into output/durations.json; fails for one above 10 without the mark slow
# make attack    every attack on configurations, checkpoints, workers and runs, with a table
# make test-torch  the tests of build_torch_optimizer, with torch in a folder of its own
# make bench     every benchmark (installs their rivals; BENCHMARKS="resident" runs one)
# make bench-rivals  rounds of other simulators beside ours, each in an environment of its own
# make figures   runs the commands above the pages' tables again, and says which figures moved (FIGURES="influence" runs some)
# make study     which rules are safe: goes on where it was left, block after block of a long plan
# make docs      the documentation, into output/site; docs-serve shows it in a browser, with its search
# make build     wheel and sdist
# make lock      resolves requirements.lock anew
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: example lint test test-all durations test-torch attack bench bench-rivals figures study docs docs-serve build lock clean

PYTHON ?= python3.11
BIN := .venv/bin
PYTEST_ARGS ?= -n auto --maxprocesses 8 --dist worksteal
EXAMPLE_ARGS ?=
ATTACK_ARGS ?=
TORCH ?= torch==2.13.0
RIVALS ?= torch fedjax flower
RIVALS_ARGS ?=
FIGURES ?=
BENCHMARKS ?= keras_optimizer pipeline aggregation rules resident resident_places reading client_memory example_clipping

example: .venv/installed
	$(BIN)/python examples/train_digits.py $(EXAMPLE_ARGS)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest $(PYTEST_ARGS) -m "not slow"

test-all: lint
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# One process, so that what tests share is built once and counts for one of them.
durations: .venv/installed
	@mkdir -p output
	$(BIN)/python -m pytest -o durations_json=output/durations.json --strict-durations

attack: .venv/installed
	$(BIN)/python tests/attacks.py $(ATTACK_ARGS)

# torch needs newer packages than TensorFlow Federated can bear: it lives in a folder of its own.
.venv-torch/installed: Makefile
	$(PYTHON) -m venv --clear .venv-torch
	.venv-torch/bin/pip install --disable-pip-version-check --quiet $(TORCH)
	@touch $@

test-torch: .venv/installed .venv-torch/installed
	TORCH_PYTHON=$(CURDIR)/.venv-torch/bin/python $(BIN)/python -m pytest tests/test_torch_optimizer.py

build: .venv/installed
	$(BIN)/python -m build --no-isolation

# Two stamps: the locked set is installed again only when the lock has changed.
.venv/locked: requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || \
	  { echo "Python 3.11 is needed, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || true). Set it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --disable-pip-version-check --quiet --no-deps --require-hashes -r requirements.lock
	@touch $@

.venv/installed: .venv/locked setup.cfg pyproject.toml
	$(BIN)/pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation --editable .
	@touch $@

# The benchmarks' rivals go into a folder of their own: the package and its tests never see them.
.venv/rivals: .venv/locked examples/benchmarks/requirements.txt
	$(BIN)/pip install --disable-pip-version-check --quiet --no-deps --upgrade --target $@ -r examples/benchmarks/requirements.txt
	@touch $@

bench: .venv/installed .venv/rivals
	for benchmark in $(BENCHMARKS); do \
	  echo; echo "## $$benchmark"; \
	  PYTHONPATH=.venv/rivals $(BIN)/python examples/benchmarks/$$benchmark.py; \
	done

# Other simulators need each other's versions as little as they need ours.
.venv-rivals/%/installed: examples/benchmarks/rivals/%.txt
	$(PYTHON) -m venv --clear .venv-rivals/$*
	.venv-rivals/$*/bin/pip install --disable-pip-version-check --quiet -r $<
	@touch $@

bench-rivals: .venv/installed $(RIVALS:%=.venv-rivals/%/installed)
	$(BIN)/python examples/benchmarks/rivals/report.py $(RIVALS_ARGS)

figures: .venv/installed
	$(BIN)/python examples/benchmarks/renew.py $(FIGURES)

study: .venv/installed
	$(BIN)/python examples/study/run.py
	$(BIN)/python examples/study/report.py --write

# The site reads docstrings from the files, so it needs no TensorFlow.
.venv-docs/installed: docs/requirements.txt
	$(PYTHON) -m venv --clear .venv-docs
	.venv-docs/bin/pip install --disable-pip-version-check --quiet -r $<
	@touch $@

docs docs-serve: .venv-docs/installed
	PATH="$(CURDIR)/.venv-docs/bin:$$PATH" NO_MKDOCS_2_WARNING=1 mkdocs \
	  $(if $(filter docs-serve,$@),serve,build) --config-file docs/mkdocs.yml

# TFF 0.87.0 pins jaxlib==0.4.14, which is gone; 0.4.13 is the nearest that is there.
lock:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/pip install --quiet uv
	printf '%s\n' 'tensorflow-federated==0.87.0' | \
	  .venv-lock/bin/uv pip compile - setup.cfg --extra examples --extra optax --extra test \
	    --override <(printf '%s\n' 'jax==0.4.13' 'jaxlib==0.4.13') \
	    --python-version 3.11 --python-platform x86_64-manylinux_2_31 \
	    --generate-hashes --no-emit-index-url --upgrade \
	    --custom-compile-command 'make lock' --output-file requirements.lock --quiet

clean:
	rm -rf .venv .venv-docs .venv-lock .venv-rivals .venv-torch build dist output *.egg-info .mypy_cache .pytest_cache .ruff_cache
