# posttrain: `make run` does everything, set-up included. `make help` lists the rest.
#
#   RECIPE=recipes/tiny_v4.yaml   the recipe to run
#   RUN=name                      name of the run (default: the recipe's name, numbered when taken)
#   SEED=n                        seed (default: the recipe's)
#   PYTHON=python3.11             the Python 3.11 that makes .venv
#   EXTRA=cpu                     cpu or cuda: which packages to install (default: those that .venv has, else cpu)

RECIPE ?= recipes/tiny_v4.yaml
RUN ?=
SEED ?=
PYTHON ?= python3
EXTRA ?=

BIN := .venv/bin

.PHONY: help setup run test lint bench report clean
.DEFAULT_GOAL := help

help:
	@echo "make setup    make .venv (skipped when current)"
	@echo "make run      train: base -> experts -> student, evaluate, report  [RECIPE= RUN= SEED=]"
	@echo "make report   write report.json and report.html of a run again     [RUN=]"
	@echo "make test     all tests"
	@echo "make lint     ruff and mypy"
	@echo "make bench    benchmarks"
	@echo "make clean    remove caches and build outputs; runs/ and .venv stay"

setup:
	@$(PYTHON) scripts/setup.py $(EXTRA)

run: setup
	@$(BIN)/posttrain run $(RECIPE) $(if $(RUN),--name $(RUN)) $(if $(SEED),--seed $(SEED))

test: setup
	@$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: setup
	@$(BIN)/python -m benchmarks

report: setup
	@$(BIN)/posttrain report $(RUN)

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -path ./.venv -prune -o -path ./runs -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
