# Each target does its own set-up: on a machine with Python 3.11 or newer and make, nothing else is needed first.

PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3.14 python3,$(if $(shell command -v $(p)),$(p))))
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
OUT ?= runs/demo

.PHONY: help demo test test-slow lint format house clean

help:
	@echo "make demo       train, compress, distill, verify and export a small network (about 3 minutes after the install)"
	@echo "make test       all checks (format, lint, spelling, layers, types) and the test suite"
	@echo "make test-slow  the tests that take minutes"
	@echo "make lint       the checks alone"
	@echo "make format     let ruff rewrite what it can"
	@echo "make house      print sizes, names and call depth of the source, with their bounds"
	@echo "make clean      remove the virtual environment and caches"

# Installed again whenever pyproject.toml changes.
$(INSTALLED): pyproject.toml
	@test -n "$(PYTHON)" || { echo "No python3 found. Install Python 3.11 or newer, or say make PYTHON=/path/to/python." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Secateur needs Python 3.11 or newer; $(PYTHON) is older. Say make PYTHON=/path/to/python." >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "$(PYTHON) cannot make virtual environments. On Debian: apt-get install python3-venv." >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --editable '.[demo,dev]'
	@touch $(INSTALLED)

demo: $(INSTALLED)
	$(BIN)/secateur demo --out $(OUT)

test: lint
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow" --cov=secateur --cov-branch --cov-report=term:skip-covered

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

lint: $(INSTALLED)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/codespell
	$(BIN)/lint-imports
	$(BIN)/pyright

format: $(INSTALLED)
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

house: $(INSTALLED)
	PYTHONPATH=src $(BIN)/python tools/house.py

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis .import_linter_cache .coverage
