# make run: train mnist_resnet with five points.
# make test: all tests.  make test-fast: those that take under a minute in total on 2 cores.  make lint: ruff and mypy.
# make test-gpu: those that need a GPU.
# make suite: all submissions on all workloads; run again, it goes on.  STUDIES=5: five seeds.  QUICK=1: two workloads.
# make docs: build the pages in site/ with links checked, in an environment of their own, which needs no torch.
# TORCH=2.5.1 picks a torch version, in its own environment; without it, 2.13.0.
VENV := .venv$(if $(TORCH),-$(TORCH))
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: run suite test test-fast test-gpu lint docs clean
run: $(VENV)/installed
	$(BIN)/python -m runner --workload=mnist_resnet --submission_path=submission.py \
	  --tuning_search_space=runner/tuning_search_space.json --num_tuning_trials=5 --rng_seed=1 --max_global_steps=667 \
	  --experiment_dir=experiments_out --experiment_name=first_run --overwrite

suite: $(VENV)/installed
	$(BIN)/python -m runner.suite $(if $(QUICK),--quick) --studies=$(or $(STUDIES),1) --output_dir=suite_out/$(if $(QUICK),quick,full)

test: $(VENV)/installed
	$(BIN)/python -m pytest

test-fast: $(VENV)/installed
	$(BIN)/python -m pytest -m "not slow"

test-gpu: $(VENV)/installed
	$(BIN)/python -m pytest -m gpu

lint: $(VENV)/installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

$(VENV)/installed: pyproject.toml requirements.txt runner/data-requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==$(or $(TORCH),2.13.0) -r requirements.txt -e '.[runner,dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r runner/data-requirements.txt
	touch $@

docs: .venv-docs/installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

.venv-docs/installed: pyproject.toml
	$(PYTHON) -m venv .venv-docs
	$(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' \
	  > .venv-docs/requirements.txt
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check -r .venv-docs/requirements.txt
	touch $@

clean:
	rm -rf .venv* site .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info build
