# make demo      compare two methods on synthetic sites; ends in the page demo-report/report.html (made anew; DEMO_OUT=dir: there)
# make test      the fast tests          make test-slow   effects, golden metrics, engines
# make lint      ruff and import layers  make types       mypy
# make results   the comparisons of docs/results.md, and their tables; DATA=folder with the site files they name
# make bench     speed measurements      make clean       remove what make made, results in runs/ excepted
#
# PYTHON=python3.12 chooses the interpreter, PYTEST_ARGS="-k state" selects tests. The environment is built in .venv on first use.

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?=
PYTEST_ARGS ?=
DEMO_OUT ?=

# One torch thread: the tests compare bits, and several threads on small tensors only get into each other's way.
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

DATA ?= .

.PHONY: help results demo test test-slow lint types bench clean dev
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

# The newest of the usual names that is at least 3.11, unless PYTHON is given.
$(BIN)/python:
	@for candidate in $(PYTHON) python3 python3.13 python3.12 python3.11; do \
	  if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found="$$candidate"; break; fi; \
	done; \
	if [ -z "$$found" ]; then echo "error: Python 3.11 or newer is needed; found none. Give one: make PYTHON=/path/to/python3.12" >&2; exit 1; fi; \
	echo "making $(VENV) with $$found"; \
	"$$found" -m venv $(VENV)

$(VENV)/.stamp-report: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing fedmed into $(VENV)"
	@$(BIN)/pip install -q -e '.[report]' -c constraints.txt
	@touch $@

$(VENV)/.stamp-dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing fedmed and its tools into $(VENV)"
	@$(BIN)/pip install -q -e '.[dev,report]' -c constraints.txt
	@touch $(VENV)/.stamp-report $@

dev: $(VENV)/.stamp-dev

demo: $(VENV)/.stamp-report
	@[ -n "$(DEMO_OUT)" ] || rm -rf demo-report
	@$(BIN)/fedmed demo --out "$(or $(DEMO_OUT),demo-report)"

test: dev
	@$(BIN)/python -m pytest -n auto --maxprocesses 4 $(PYTEST_ARGS)

test-slow: dev
	@$(BIN)/python -m pytest -m "slow and not processes" -n auto --maxprocesses 4 $(PYTEST_ARGS) || [ $$? -eq 5 ]
	@$(BIN)/python -m pytest -m "slow and processes" $(PYTEST_ARGS) || [ $$? -eq 5 ]

lint: dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports

types: dev
	@$(BIN)/mypy fedmed strategies clients data_prep

bench: dev
	@for script in benchmarks/aggregation.py benchmarks/round_overhead.py benchmarks/startup.py benchmarks/losses.py benchmarks/site_reading.py benchmarks/importing.py; do [ -e "$$script" ] || { echo "no benchmarks"; break; }; echo "== $$script"; $(BIN)/python "$$script" || exit 1; done

results: dev
	@$(BIN)/fedmed compare label_noise --data "$(DATA)/ham10000_cls.h5"
	@$(BIN)/fedmed compare contour_noise --data "$(DATA)/ham10000_seg.h5"
	@$(BIN)/fedmed compare image_quality --data "$(DATA)/ham10000_cls.h5"
	@$(BIN)/fedmed compare dropped_annotation --data "$(DATA)/ham10000_seg.h5"
	@$(BIN)/fedmed compare dropped_annotation_volumes --data "$(DATA)/lgg_mri.h5"
	@$(BIN)/fedmed compare weak_labels --data "$(DATA)/acdc_scribble.h5"
	@$(BIN)/fedmed compare mixed_labels --data "$(DATA)/ham10000_seg.h5"
	@$(BIN)/fedmed compare missing_classes --data "$(DATA)/nih_cxr.h5"
	@$(BIN)/fedmed compare long_tail --data "$(DATA)/ham10000_cls.h5"
	@$(BIN)/fedmed compare missing_modalities --data "$(DATA)/lgg_mri.h5"
	@$(BIN)/python docs/build_results.py runs/compare

clean:
	@rm -rf $(VENV) demo-report build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
