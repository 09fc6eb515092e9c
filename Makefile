# Two commands: `make bench` and `make test`.  Each creates the environment it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.installed-docs
ARGS ?=

export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: help bench docs test test-slow lint venv clean

help:
	@echo "make bench      fine-tune SmolLM2-135M with every method and compare (ARGS=... for options)"
	@echo "make test       lint, types and tests"
	@echo "make test-slow  the proofs that train, compile, kill or measure"
	@echo "make docs       build the course, the how-to pages and the reference into site/"
	@echo "make clean      remove the environment"

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt requirements-data.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'minipeft needs Python 3.11 or newer')"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps -r requirements-data.txt
	touch $(STAMP)

bench: $(STAMP)
	$(BIN)/python -m benchmarks methods $(ARGS)

$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[docs]"
	touch $(DOCS_STAMP)

docs: export NO_MKDOCS_2_WARNING = 1
docs: $(DOCS_STAMP)
	$(BIN)/python -m mkdocs build --strict $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/codespell .

test: export OMP_NUM_THREADS = 1
test: lint
	$(BIN)/python -m pytest -q -n auto -m "not slow" $(ARGS)

test-slow: export OMP_NUM_THREADS = 1
test-slow: $(STAMP)
	$(BIN)/python -m pytest -q -rs -n auto -m slow $(ARGS)

clean:
	rm -rf $(VENV) build dist site *.egg-info
