# `make check` is what every change must pass; `make format` mends what can be mended by machine.
PYTHON ?= python

.PHONY: check format lint types layers equations torchvision models test test-slow

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

# For the families whose processors need it, and for tests alone: tests/torchvision_shim.py. Without it those are skipped.
torchvision:
	[ -d .torchvision/torchvision ] || $(PYTHON) -m pip install --quiet --no-deps --retries 1 --target .torchvision \
		torchvision==0.28.0 num2words docopt || echo "torchvision cannot be had: tests that need it are skipped"

models:
	$(PYTHON) scripts/model_table.py

# A file's tests stay together, in one of two processes with one thread each.
test:
	$(PYTHON) -m pytest -q -n 2 --dist loadfile

test-slow:
	$(PYTHON) -m pytest -q -m slow
