# make quickstart   SFT, reward model, DPO and PPO on the embedded world, and a report: the main job
# make test         all tests
# make check        style, types, import contracts, fast tests
#
# Each makes .venv and installs into it, once. Options are handed on: make quickstart ARGS="--seed_everything 2"
PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
PINNED := pyproject.toml constraints.txt

.PHONY: help quickstart test check lint format clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

quickstart: $(VENV)/.installed
	$(BIN)/python -m rlhf_lightning pipeline -c configs/quickstart/pipeline.yaml $(ARGS)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(ARGS)

check: lint
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis build *.egg-info

# The constraints stand in the first command that resolves anything: torch comes as the one build that they name.
$(VENV)/.installed: $(PINNED)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(PINNED)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(VENV)/.installed $@
