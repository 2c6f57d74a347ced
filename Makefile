# make demo: watch a small student learn (CPU, minutes).   make test: lint and tests.   PYTHON=python3.12 picks another Python.
PYTHON ?= python3
BIN = .venv/bin

demo: .venv/installed
	$(BIN)/python train_distill.py configs/toy_opd.py --overwrite
	$(BIN)/python plot.py out/toy_opd

test: lint
	$(BIN)/python -m pytest

test-all: lint
	$(BIN)/python -m pytest -m ""

lint: .venv/installed-dev
	$(BIN)/ruff check .

bench: .venv/installed
	$(BIN)/python tests/bench_step.py

venv: $(BIN)/python

$(BIN)/python:
	@$(PYTHON) -c "import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 13) else \
		f'error: $(PYTHON) is {v[0]}.{v[1]}; Python 3.11 or 3.12 is needed: make PYTHON=python3.12 $(MAKECMDGOALS)')"
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q --disable-pip-version-check -e .
	@touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/python -m pip install -q --disable-pip-version-check -e ".[dev]"
	@touch $@

.PHONY: demo test test-all lint bench venv
