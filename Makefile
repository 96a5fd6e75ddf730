PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help quickstart test format build clean

help: ## List the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | expand -t 14

quickstart: $(VENV)/examples.stamp ## Run the quickstart example
	$(BIN)/python examples/quickstart.py

test: $(VENV)/dev.stamp ## Check style and types, run all tests
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m pytest

format: $(VENV)/dev.stamp ## Format the code and fix what can be fixed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

build: $(VENV)/dev.stamp ## Build sdist and wheel in dist/
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

clean: ## Delete everything that the other targets make
	rm -rf $(VENV) dist quickstart.png .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One environment for all targets; a stamp says that an extra is installed.
$(VENV)/%.stamp: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "hierloss needs Python 3.10 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable '.[$*]'
	touch $@
