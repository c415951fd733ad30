# Each target does its own set-up: on a machine with Python 3.11 or newer and make, nothing else is needed first.

PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3.14 python3,$(if $(shell command -v $(p)),$(p))))
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PINNED := requirements/pinned.txt
LOWEST := requirements/lowest.txt
OUT ?= runs/demo

# The window of tested versions: environments with the lowest and with the newest, and the tests that run in both.
# The lowest numpy and scipy have no wheels for Python 3.13.
LOWEST_PYTHON ?= $(firstword $(foreach p,python3.11 python3.12,$(if $(shell command -v $(p)),$(p))))
WINDOW_TESTS := pytest -n 2 --dist worksteal -m "window and not slow"
WINDOW_PACKAGES := torch|torchvision|timm|lightning-fabric|torchmetrics|safetensors|numpy|scipy|onnx|onnxscript|onnxruntime|pyarrow|pillow
COMPILE := $(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --no-annotate \
	--custom-compile-command 'make pins' pyproject.toml

.PHONY: help docs smoke demo test test-slow test-lowest test-latest pins lint format house clean

help:
	@echo "make demo       train, compress, distill, verify and export a small network (about 3 minutes after the install)"
	@echo "make test       all checks (format, lint, spelling, layers, types) and the test suite; LONG=yes adds its longest tests"
	@echo "make test-slow  the tests that take minutes"
	@echo "make test-lowest, make test-latest"
	@echo "                what depends on versions, with the lowest and the newest (5 minutes each after the install)"
	@echo "make docs       build the site of the documentation in build/site"
	@echo "make smoke      build the wheel and use it in an empty environment"
	@echo "make pins       choose the pinned versions anew (requirements/)"
	@echo "make lint       the checks alone"
	@echo "make format     let ruff rewrite what it can"
	@echo "make house      print sizes, names and call depth of the source, with their bounds"
	@echo "make clean      remove the virtual environment and caches"

# Installed again whenever pyproject.toml or the pinned versions change.
$(INSTALLED): pyproject.toml $(PINNED)
	@test -n "$(PYTHON)" || { echo "No python3 found. Install Python 3.11 or newer, or say make PYTHON=/path/to/python." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Secateur needs Python 3.11 or newer; $(PYTHON) is older. Say make PYTHON=/path/to/python." >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "$(PYTHON) cannot make virtual environments. On Debian: apt-get install python3-venv." >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --constraint $(PINNED) --editable '.[demo,dev]'
	@touch $(INSTALLED)

demo: $(INSTALLED)
	$(BIN)/secateur demo --out $(OUT)

# The longest tests (the marker long) and the measuring of coverage take as long again, so only continuous integration has
# both: make test LONG=yes COVERAGE=yes.
test: lint
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow$(if $(LONG),, and not long)" \
		$(if $(COVERAGE),--cov=secateur --cov-branch --cov-report=term:skip-covered)

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m "slow or long"

test-lowest: $(INSTALLED)
	@test -n "$(LOWEST_PYTHON)" || { echo "The lowest versions need Python 3.11 or 3.12; found neither." >&2; exit 1; }
	$(LOWEST_PYTHON) -m venv --clear .venv-lowest
	$(BIN)/uv pip install --quiet --compile-bytecode --python .venv-lowest/bin/python --constraint $(LOWEST) --editable '.[demo,test]'
	$(call test-window,lowest)

# Without any constraint, so that it is the first to fail when something new comes out.
test-latest: $(INSTALLED)
	$(PYTHON) -m venv --clear .venv-latest
	$(BIN)/uv pip install --quiet --compile-bytecode --python .venv-latest/bin/python --upgrade --editable '.[demo,test]'
	$(call test-window,latest)

define test-window
	@.venv-$(1)/bin/python --version
	@$(BIN)/uv pip list --quiet --python .venv-$(1)/bin/python --format freeze | grep -E '^($(WINDOW_PACKAGES))=='
	.venv-$(1)/bin/python -m $(WINDOW_TESTS)
	.venv-$(1)/bin/secateur demo --out runs/demo-$(1)
endef

smoke: $(INSTALLED)
	$(BIN)/python tools/smoke.py

# In an environment of its own: a page needs neither torch nor the package.
docs:
	@test -n "$(PYTHON)" || { echo "No python3 found. Install Python 3.11 or newer, or say make PYTHON=/path/to/python." >&2; exit 1; }
	@test -x .venv-docs/bin/python || $(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --constraint $(PINNED) mkdocs-material 'mkdocstrings[python]'
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet
	@echo "Open build/site/index.html"

# pyproject.toml says which versions may be used; these files say which ones are.
pins: $(INSTALLED)
	$(COMPILE) --extra demo --extra dev --extra docs --extra tested --constraint requirements/pinned.in --output-file $(PINNED)
	$(COMPILE) --extra demo --resolution lowest-direct --output-file $(LOWEST)

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
	rm -rf $(VENV) .venv-lowest .venv-latest .venv-docs build/site .pytest_cache .ruff_cache .hypothesis .import_linter_cache .coverage
