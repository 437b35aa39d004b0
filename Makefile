# make setup | check | test | test-fast | test-slurm | test-container | faults | demo | reference | clean
SHELL := /bin/bash
.DEFAULT_GOAL := help

UV_VERSION := 0.13.9
BIN := .venv/bin
READY := .venv/.ready
# Python alone, where nothing imports it but the tests of its layers: installed whole, it would have to find a GPU.
ENGINE := .venv/engine/.ready
ENGINE_PACKAGES := transformer-engine==2.20.2 einops==0.8.2
# Options of pytest for this call, as in: make test PYTEST_ARGS="-k lineage"
PYTEST_ARGS ?=

.PHONY: help setup check test test-fast test-slurm test-container faults demo reference clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 23

setup: $(READY) ## create .venv with the locked versions (needs Python 3.12 only)

# Compiled once here: where Python may not write its cache (PYTHONDONTWRITEBYTECODE), each process of each stage would
# compile torch and megatron again, for seconds.
# A `python3.12` of pyenv may exist and yet refuse to run, so each candidate is tried.
$(READY): pyproject.toml uv.lock
	@set -euo pipefail; \
	for python in python3.12 python3 "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.12*/bin/python; do \
	    "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && break; \
	    python=; \
	done; \
	[[ -n "$$python" ]] || { echo "make setup: no Python 3.12 found; install it, or run: pyenv install 3.12" >&2; exit 1; }; \
	[[ -x $(BIN)/python ]] || "$$python" -m venv .venv; \
	if [[ "$$($(BIN)/uv --version 2>/dev/null)" != "uv $(UV_VERSION)"* ]]; then \
	    $(BIN)/python -m ensurepip --upgrade >/dev/null; \
	    $(BIN)/python -m pip install --quiet "uv==$(UV_VERSION)"; \
	fi; \
	VIRTUAL_ENV= UV_PROJECT_ENVIRONMENT=.venv $(BIN)/uv sync --frozen --inexact --compile-bytecode --extra dev --python $(BIN)/python; \
	touch $@

# Those tests skip themselves where it could not be had.
$(ENGINE): $(READY)
	@VIRTUAL_ENV= $(BIN)/uv pip install --quiet --no-deps --python $(BIN)/python --target $(@D) $(ENGINE_PACKAGES) \
	    && touch $@ || echo "make: no sources of Transformer Engine: the tests of its layers are left out"

check: $(READY) ## style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# One worker keeps a file of tests: those with several ranks choose free ports, and two cores are enough for two.
test: check $(ENGINE) ## check, then every test (those for a GPU skip themselves)
	$(BIN)/pytest -n 2 --dist loadfile $(PYTEST_ARGS)

test-fast: $(READY) ## the tests of one process, in seconds
	$(BIN)/pytest -n 2 --dist loadfile -m "not slow and not distributed and not gpu" $(PYTEST_ARGS)

# Debian's packages, where they are missing and this user may install them; the daemons are those of the tests alone.
test-slurm: $(READY) ## jobs against a private Slurm of two nodes on this machine (a quarter of an hour)
	@PATH="$$PATH:/usr/sbin"; command -v slurmctld slurmd munged >/dev/null \
	    || { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq slurm-wlm munge; } >/dev/null \
	    || { echo "make test-slurm: install Slurm and munge first (Debian: slurm-wlm, munge)" >&2; exit 1; }
	TEST_SLURM=1 $(BIN)/pytest -q -s tests/slurm $(PYTEST_ARGS)

test-container: $(READY) ## the Dockerfile's steps, and exports in other versions of transformers, in new environments (downloads)
	TEST_CONTAINER=1 $(BIN)/pytest -q tests/container $(PYTEST_ARGS)

faults: $(READY) ## kill, stop and starve commands at random, hundreds of times (some hours)
	FAULTS=all $(BIN)/pytest -q -s tests/faults tests/distributed/test_resharding.py $(PYTEST_ARGS)

demo: $(READY) ## the whole pipeline on a small made-up corpus, on CPU or GPU
	scripts/pipeline.sh

reference: $(READY) ## write docs/configuration.md from the schema
	$(BIN)/python -c 'from pathlib import Path; from offline_align.config.reference import reference_page; \
	    from offline_align.stages.registry import STAGES; \
	    page = reference_page({name: stage.schema for name, stage in STAGES.items()}); \
	    Path("docs/configuration.md").write_text(page, encoding="utf-8")'

clean: ## remove caches and build outputs; .venv and runs stay
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
	find offline_align tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
