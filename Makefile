# VENV     the virtual environment that everything runs in
# PYTHON   the interpreter that makes it: 3.10 to 3.14; by default the first one found
# TORCH    what to ask pip for instead of the newest pair of torch and torchvision
# JOBS     processes that share the tests; each of them needs 4 GB of memory
VENV ?= .venv
TORCH ?=
JOBS ?= 2
FITS := import ensurepip, sys, venv; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))
ifndef PYTHON
PYTHON := $(shell for p in python3 python3.13 python3.12 python3.11 python3.10 \
	python3.14 "$(VENV)/bin/python"; do \
	"$$p" -c '$(FITS)' 2>/dev/null && echo "$$p" && break; done)
endif
RUN := "$(VENV)/bin/python"
PYTEST := $(RUN) -m pytest -n $(JOBS) --dist worksteal --durations=15

.DEFAULT_GOAL := help
.PHONY: help install demo notebook docs test test-all lint format type bench hooks clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 16
	@echo "Variables: VENV=$(VENV) PYTHON=$(PYTHON) TORCH= JOBS=$(JOBS) DEMO_ARGS= PYTEST_ARGS="

install: ## make or check the environment in VENV; all targets below do it first
	@"$(PYTHON)" -c '$(FITS)' 2>/dev/null || { \
	  echo "error: Python 3.10 to 3.14 with the venv module is needed, and" \
	    "'$(PYTHON)' is none. Install one (Debian and Ubuntu: apt install python3" \
	    "python3-venv python3-dev) or name one: make PYTHON=/path/to/python3.13"; \
	  exit 1; } >&2
	@"$(PYTHON)" tools/setup_env.py --venv "$(VENV)" --torch "$(TORCH)"

demo: install ## train a small detector and look into it; opens nothing by itself
	@$(RUN) tools/demo.py $(DEMO_ARGS)

notebook: install ## run docs/quickstart.ipynb on the demo's detector, and keep what it shows
	@"$(VENV)/bin/jupyter-execute" --inplace docs/quickstart.ipynb

docs: install ## the site of the documents, in work_dirs/site; a broken link fails
	@NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build -q

test: install ## the tests, but for what is marked as nightly
	@$(PYTEST) -m "not nightly" $(PYTEST_ARGS)

test-all: install ## all tests
	@$(PYTEST) $(PYTEST_ARGS)

lint: install ## ruff: errors and formatting
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .

format: install ## let ruff repair what it can
	@$(RUN) -m ruff check --fix .
	@$(RUN) -m ruff format .

type: install ## mypy
	@$(RUN) -m mypy

bench: install ## every script in tools/benchmarks
	@for script in tools/benchmarks/[!_]*.py; do \
	  echo "== $$script"; $(RUN) "$$script" || exit 1; done

hooks: install ## run lint and type before each commit
	@$(RUN) -m pre_commit install

clean: ## caches and build leftovers; the environment and the results stay
	rm -rf build dist tools/*.egg-info .mypy_cache .pytest_cache .ruff_cache .coverage
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
