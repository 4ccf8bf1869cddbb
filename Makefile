# `make` lists what it can do. Everything runs in .venv, which is made on first use.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help run test test-all lint format docs clean

# What makes the environment: at least Python 3.11.4.
PYTHON ?= python3
# Tests at once; each with one thread, so that they do not fight for cores.
JOBS ?= 2

BIN := .venv/bin
READY := .venv/.ready
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS)

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

run: $(READY) ## Search, retrain and test on the embedded digits, in minutes
	@$(BIN)/python -m gatl experiment=quickstart

test: $(READY) ## Run the tests but for the slow ones
	@$(PYTEST) -m "not slow"

test-all: $(READY) ## Run all tests
	@$(PYTEST)

lint: $(READY) ## Check style, formatting and types; changes nothing
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

format: $(READY) ## Format the code and mend what can be mended
	@$(BIN)/ruff check --fix-only
	@$(BIN)/ruff format

docs: $(READY) ## Make docs/configuration.md of conf/, and the drawing of the layers
	@$(BIN)/python docs/configuration.py
	@$(BIN)/python docs/chromosome.py

clean: ## Remove the environment, caches and builds; run folders stay
	rm -rf .venv build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find conf gatl tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Installed anew when pyproject.toml changes; the source itself is installed editable.
$(READY): pyproject.toml
	@echo 'Setting up .venv: some minutes, most of them for PyTorch ...'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev,tensorboard,wandb]'
	@touch $@
