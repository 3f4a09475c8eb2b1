# What a fresh clone needs is Python >= 3.10 with venv and pip, and make.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
PEERS_VENV ?= .venv-peers
PEERS ?= ../shared/peers
WORKERS ?= 2
BIN := $(VENV)/bin

# pip may mention package locations that do not exist here, once per package. Only that line is
# dropped: every other message, and the exit status of pip, stand.
PIP_NOISE := { grep -v 'is ignored: it is neither a file nor a directory' || true; }

.PHONY: help demo test lint types imports docs pytest test-slow bench format clean
.DELETE_ON_ERROR:

help:
	@echo "make demo       install the command and clean a table with 20 % wrong labels"
	@echo "make test       format, lint, types, import contracts, docs and the fast tests"
	@echo "make test-slow  the tests that take long"
	@echo "make bench      every figure of README and docs, beside the peers where installed"
	@echo "make format     let ruff format and fix the code"
	@echo "make clean      remove what was built (delete $(VENV) for a fresh environment)"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "woodbury needs Python >= 3.10; set PYTHON=python3.11, say" >&2; exit 1; }
	@echo "creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-app: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing woodbury and its command (a few minutes the first time)"
	@set -o pipefail; $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[app]' 2>&1 | $(PIP_NOISE)
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing woodbury and what its tests need (a few minutes the first time)"
	@set -o pipefail; $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]' 2>&1 | $(PIP_NOISE)
	@touch $(VENV)/.installed-app $@

demo: $(VENV)/.installed-app
	@$(BIN)/woodbury clean --demo digits </dev/null

test: lint types imports docs pytest
	@echo "all checks passed"

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

imports: $(VENV)/.installed-dev
	$(BIN)/lint-imports

docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

pytest: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -m "not slow" -n $(WORKERS)

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -m slow

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The peers are other people's libraries with pins of their own: an environment of their own. All
# that are listed there cannot be installed together; these are the ones that benchmarks call.
BENCH_PEERS := curvlinops-for-pytorch cleanlab scikit-learn jax jaxopt lineax matfree

$(PEERS_VENV)/.installed: Makefile $(wildcard $(PEERS)/requirements.txt $(PEERS)/constraints.txt)
	@set -eo pipefail; if [ ! -f $(PEERS)/requirements.txt ]; then \
	  echo "no $(PEERS)/requirements.txt: benchmarks run without the peers beside them"; \
	else \
	  echo "installing the peers into $(PEERS_VENV)"; \
	  [ -x $(PEERS_VENV)/bin/python ] || $(PYTHON) -m venv $(PEERS_VENV); \
	  $(PEERS_VENV)/bin/python -m pip install -q --disable-pip-version-check \
	    $(addprefix -c ,$(wildcard $(PEERS)/requirements.txt $(PEERS)/constraints.txt)) \
	    $(BENCH_PEERS) 2>&1 | $(PIP_NOISE); \
	  touch $@; \
	fi

bench: $(VENV)/.installed-dev $(PEERS_VENV)/.installed
	@for script in benchmarks/[!_]*.py; do echo "== $$script"; $(BIN)/python $$script; done

clean:
	rm -rf build dist site woodbury-report src/*.egg-info \
	  .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache
	find src tests benchmarks examples docs -name __pycache__ -type d -prune -exec rm -rf {} +
