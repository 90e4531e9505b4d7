# Every target sets up what it needs in .venv; `make demo` and `make test` work as the first command on a fresh machine.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
THREADS ?= 2

.PHONY: setup demo test slow bench docs lint clean

.venv/base: constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) -e .
	touch $@

.venv/dev: .venv/base
	$(PIP) -e ".[dev,examples]"
	touch $@

.venv/examples: .venv/base
	$(PIP) -e ".[examples]"
	touch $@

.venv/bench: .venv/dev
	$(PIP) -e ".[bench]"
	touch $@

.venv/docs: .venv/base
	$(PIP) -e ".[docs]"
	touch $@

setup: .venv/dev

demo: .venv/examples
	$(BIN)/python examples/quickstart.py

test: .venv/dev
	$(BIN)/python -m pytest

slow: .venv/bench
	$(BIN)/python -m pytest -m "slow or parity"

bench: .venv/bench
	$(BIN)/python bench/kfac_cost.py --threads $(THREADS)

docs: .venv/docs
	$(BIN)/pdoc --docformat google --output-directory docs/api curvlib

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv docs/api demo.png
