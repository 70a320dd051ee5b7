# Two commands on a fresh machine: `make demo` and `make test`. Only Python 3.11-3.13 and the package index are needed.
PYTHON ?= python3
VENV ?= .venv
SHELL := /bin/sh
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
# Two test processes with one thread each use two cores; more threads would fight for them. Tests of one file share its
# expensive fixtures, so a file runs in one process.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist loadfile

ifneq ($(words $(VENV)),1)
$(error VENV="$(VENV)" holds a space, which make cannot read in a name: give a path without one; the folder itself may have one)
endif

.DEFAULT_GOAL := help
.PHONY: help demo test docs pipelines fuzz soak lint clean

help:  ## show this help
	@echo "make TARGET   (PYTHON=$(PYTHON) VENV=$(VENV))"
	@grep -E '^[a-z]+:.*## ' Makefile | sed -E 's/^([a-z]+):.*## (.*)/  make \1|\2/' | awk -F'|' '{printf "%-12s %s\n", $$1, $$2}'

demo: $(VENV)/.installed  ## distill four-step students on the Shapes world and write a report (5 minutes on two cores)
	$(BIN)/gdmd demo

test: $(VENV)/.installed-dev  ## run all tests
	$(ONE_THREAD) $(PYTEST)

docs: $(VENV)/.installed-docs  ## build the documentation site into build/site, warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

pipelines: $(VENV)/.installed-dev  ## train and measure everything in docs/results/pipelines.md (hours, resumable)
	$(BIN)/gdmd sweep pipelines --out runs/pipelines
	mkdir -p docs/results/pipelines
	cp runs/pipelines/pipelines/*.png docs/results/pipelines/
	cp runs/pipelines/pipelines.md runs/pipelines/pipelines.jsonl docs/results/

fuzz: $(VENV)/.installed-dev  ## thousands of malformed inputs, different ones each time (minutes)
	$(ONE_THREAD) $(PYTEST) --hypothesis-profile=fuzz $$(grep -rlE "import (.*, )?given" tests)

soak: $(VENV)/.installed-dev  ## 200 random kills and resumes of a tiny run, compared with the whole one (minutes)
	$(ONE_THREAD) $(BIN)/python tests/support/soak.py

lint: $(VENV)/.installed-dev  ## ruff, format check, import contract and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/mypy

clean:  ## remove the virtual environment and the caches (never a run)
	rm -rf "$(VENV)" build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

# Stamps: an install runs again only when the dependencies changed.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v < (3, 14) else \
	  "gdmd needs Python 3.11 to 3.13, $(PYTHON) is %d.%d: run make PYTHON=python3.12 (or 3.11, 3.13)" % v[:2])'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: pyproject.toml constraints.txt $(VENV)/.created
	@echo "installing gdmd into $(VENV) (a minute or more, torch is large)"
	@$(PIP) -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt $(VENV)/.created
	@echo "installing gdmd and the test tools into $(VENV) (a minute or more, torch is large)"
	@$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-docs: pyproject.toml constraints.txt $(VENV)/.created
	@echo "installing gdmd and the documentation tools into $(VENV)"
	@$(PIP) -e '.[docs]'
	@touch $@ $(VENV)/.installed
