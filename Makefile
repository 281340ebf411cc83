# What a newcomer and a developer type. Needs GNU make, git and Python 3.11 or newer; everything else goes into .venv.
#
#   make demo                      set up, then train the demo and write its report
#   make test                      set up, then run the tests (all but those of minutes each)
#
# Variables: PYTHON=python3.12  VENV=.venv  PRESET=demo  JOBS=2 (test processes)  PIP_ARGS="..." (for pip install)

PYTHON ?= python3
VENV ?= .venv
PRESET ?= demo
JOBS ?= 2
PIP_ARGS ?=
BROWSER ?= auto
EXTRAS := demo,dev,flower,generation,hub
# what only tests need, so that a first run does not wait for it
TEST_EXTRAS := mlflow,notebooks,tensorboard

BIN := $(VENV)/bin
STAMP := $(VENV)/.privfed-setup
TEST_STAMP := $(VENV)/.privfed-test-setup
TORCH := $(shell grep -m 1 '^torch==' constraints.txt)
PIP := $(BIN)/python -m pip --disable-pip-version-check install $(PIP_ARGS)
# one thread a test process: more processes, not more threads, use the cores
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: test-long help setup demo flower-demo test check lint docs docs-check bench clean browser dist sbom test-lowest notebooks
.SUFFIXES:

help:
	@echo "make demo    set up, train the demo (PRESET=$(PRESET)) and write its report"
	@echo "make test    set up and run the tests, all but those of minutes each"
	@echo "make flower-demo  the demo with four sites over Flower, on this machine"
	@echo "make test-long   the tests that take minutes each"
	@echo "make check   everything a change has to pass: style, types, imports, tests, docs"
	@echo "make docs    build the documentation into site/"
	@echo "make bench   run every benchmark"
	@echo "make dist    build wheel and source archive into dist/ and check them"
	@echo "make sbom    write what the environment is made of to dist/privfed.cdx.json (CycloneDX)"
	@echo "make test-lowest   a part of the tests with the lowest torch, transformers and peft allowed"
	@echo "make notebooks     run the notebooks again and store their outputs"
	@echo "make setup   only set up: $(VENV) with the versions of constraints.txt"
	@echo "make clean   remove $(VENV), caches and build outputs; runs/ is never touched"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "privfed needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo 'not there')." \
	    "Install one and name it: make PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { \
	  echo "$(PYTHON) cannot make a virtual environment. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	$(PIP) $(TORCH)
	$(PIP) -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@

$(TEST_STAMP): $(STAMP)
	$(PIP) -c constraints.txt -e ".[$(TEST_EXTRAS)]"
	@touch $@

# The next free folder (runs/demo, runs/demo-2, ...); a run that was interrupted is continued.
demo: setup
	@out=runs/$(PRESET); n=1; resume=; \
	while [ -e "$$out/report.html" ]; do n=$$((n + 1)); out=runs/$(PRESET)-$$n; done; \
	if [ -e "$$out/config.toml" ]; then resume=--resume; echo "Continuing the run in $$out."; fi; \
	$(BIN)/privfed train $(PRESET) -o "$$out" $$resume && echo "Report:     $$out/report.html (open it in a browser)"

# The report is also tested in a headless Chromium; where there is none and none can be had, those tests are skipped.
browser:
	@if [ "$(BROWSER)" = auto ] && ! command -v chromium >/dev/null && ! command -v chromium-browser >/dev/null \
	    && ! command -v google-chrome >/dev/null && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "Installing chromium for the report's browser tests (BROWSER=no leaves it out)."; \
	  export DEBIAN_FRONTEND=noninteractive; \
	  { timeout 120 apt-get update -qq && timeout 300 apt-get install -y -qq --no-install-recommends chromium; } \
	    >/dev/null 2>&1 || echo "It could not be installed: the browser tests will be skipped."; \
	fi

# The demo over Flower on loopback: TLS, node authentication, four sites; compared with the run in one process.
flower-demo: setup
	PRIVFED=$(BIN)/privfed PYTHON=$(BIN)/python benchmarks/flower_demo.sh runs/flower-demo

test: $(TEST_STAMP) browser
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup --no-loadscope-reorder -m "not long"

# deployments over bad networks and Flower's own command: minutes each
test-long: $(TEST_STAMP)
	$(ONE_THREAD) $(BIN)/python -m pytest -m long

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs-check: setup
	$(BIN)/python docs/generate.py --check
	$(BIN)/python docs/links.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir site

check: lint docs-check test

docs: setup
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir site
	@echo "Open site/index.html"

# --no-isolation: built with the pinned hatchling, and no download
dist: setup
	$(PIP) -c constraints.txt -e ".[release]"
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist .
	$(BIN)/python -m twine check --strict dist/*
	$(ONE_THREAD) $(BIN)/python -m pytest -q tests/release

sbom: setup
	$(PIP) -c constraints.txt -e ".[release]"
	@mkdir -p dist
	$(BIN)/cyclonedx-py environment --pyproject pyproject.toml --mc-type library --output-reproducible \
	  --output-format JSON --output-file dist/privfed.cdx.json $(BIN)/python
	@echo "Wrote dist/privfed.cdx.json"

# its own environment, LOWEST_VENV; several GB on Linux, where the lowest torch comes with its GPU libraries
LOWEST_VENV ?= .venv-lowest
test-lowest:
	test -x $(LOWEST_VENV)/bin/python || $(PYTHON) -m venv $(LOWEST_VENV)
	$(LOWEST_VENV)/bin/python -m pip --disable-pip-version-check install $(PIP_ARGS) \
	  $$($(PYTHON) tests/release/lowest.py) -e ".[demo,hub]" pytest pytest-timeout hypothesis
	$(ONE_THREAD) $(LOWEST_VENV)/bin/python -m pytest -q tests/privfed/test_run.py tests/privfed/test_export.py \
	  tests/privfed/models tests/privfed/tuning/test_tunings.py

notebooks: $(TEST_STAMP)
	$(BIN)/python notebooks/run.py notebooks/*.ipynb

bench: setup
	@for file in benchmarks/*.py; do echo "== $$file"; $(BIN)/python "$$file" || exit 1; done

clean:
	rm -rf $(VENV) $(LOWEST_VENV) site dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find src attacks audits tests benchmarks docs notebooks -name __pycache__ -type d -prune -exec rm -rf {} +
