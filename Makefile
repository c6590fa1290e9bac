# `make check` is what every change must pass; `make format` mends what can be mended by machine.
PYTHON ?= python

.PHONY: check format lint types layers equations test test-slow

check: lint types layers equations test

format:
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

types:
	$(PYTHON) -m mypy

layers:
	$(PYTHON) -c 'from importlinter.cli import lint_imports_command; lint_imports_command()'

equations:
	$(PYTHON) scripts/check_equations.py

test:
	$(PYTHON) -m pytest -q

test-slow:
	$(PYTHON) -m pytest -q -m slow
