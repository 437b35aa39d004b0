# `make help` lists the targets.
SHELL := /bin/bash
.DEFAULT_GOAL := help

UV_VERSION := 0.13.9
BIN := .venv/bin
READY := .venv/.ready
# Only the Python code of Transformer Engine, in a folder that only its tests import. A full installation needs CUDA.
ENGINE := .venv/engine/.ready
ENGINE_PACKAGES := transformer-engine==2.20.2 einops==0.8.2
# Extra pytest options, for example: make test PYTEST_ARGS="-k lineage"
PYTEST_ARGS ?=

.PHONY: help setup check test test-fast test-slurm test-container faults demo reference clean

help: ## list these targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 23
	@echo
	@echo '  One test file or test:   make test-fast PYTEST_ARGS="tests/unit/data -k pack"'
	@echo '  GPU tests, on a GPU:     $(BIN)/pytest -m gpu'

setup: $(READY) ## create .venv with the locked package versions (needs only Python 3.12)

# --compile-bytecode: if Python may not write its cache (PYTHONDONTWRITEBYTECODE), each process of each stage would
# otherwise spend seconds on compiling torch and megatron.
# A `python3.12` shim of pyenv may exist but fail to run, so every candidate is tried.
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

# If the download fails, the tests of Transformer Engine's layers are skipped.
$(ENGINE): $(READY)
	@VIRTUAL_ENV= $(BIN)/uv pip install --quiet --no-deps --python $(BIN)/python --target $(@D) $(ENGINE_PACKAGES) \
	    && touch $@ || echo "make: cannot download Transformer Engine: the tests of its layers are skipped"

check: $(READY) ## check lint, format and types (ruff, mypy)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Two workers suit two cores. loadfile runs a test file in one worker, so its fixtures are built once. Tests with
# several ranks choose free ports, so they can run in parallel.
# Threads that wait asleep leave the cores to the tests beside them. The commands set this for themselves.
test test-fast: export OMP_WAIT_POLICY ?= passive
test: check $(ENGINE) ## run check and the whole test suite; GPU tests are skipped without a GPU
	$(BIN)/pytest -n 2 --dist loadfile $(PYTEST_ARGS)

test-fast: $(READY) ## run the quick tests only: no slow, multi-rank or GPU tests
	$(BIN)/pytest -n 2 --dist loadfile -m "not slow and not distributed and not gpu" $(PYTEST_ARGS)

# Installs Debian's Slurm packages if they are missing and the user may do so. The tests start their own daemons.
test-slurm: $(READY) ## test batch jobs on a private two-node Slurm on this machine (about 15 minutes)
	@PATH="$$PATH:/usr/sbin"; command -v slurmctld slurmd munged >/dev/null \
	    || { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq slurm-wlm munge; } >/dev/null \
	    || { echo "make test-slurm: install Slurm and munge first (Debian: slurm-wlm, munge)" >&2; exit 1; }
	TEST_SLURM=1 $(BIN)/pytest -q -s tests/slurm $(PYTEST_ARGS)

test-container: $(READY) ## test the Dockerfile's steps, and exports with other transformers versions (downloads)
	TEST_CONTAINER=1 $(BIN)/pytest -q tests/container $(PYTEST_ARGS)

faults: $(READY) ## run the fault tests: kill, stop and starve commands hundreds of times (hours)
	FAULTS=all $(BIN)/pytest -q -s tests/faults tests/distributed/test_resharding.py $(PYTEST_ARGS)

demo: $(READY) ## run the whole pipeline on a small synthetic corpus, on CPU or GPU
	scripts/pipeline.sh

reference: $(READY) ## regenerate docs/configuration.md after a change of configuration keys
	$(BIN)/python -c 'from pathlib import Path; from offline_align.config.reference import reference_page; \
	    from offline_align.stages.registry import STAGES; \
	    page = reference_page({name: stage.schema for name, stage in STAGES.items()}); \
	    Path("docs/configuration.md").write_text(page, encoding="utf-8")'

clean: ## remove caches and build outputs; keep .venv and runs
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
	find offline_align tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
