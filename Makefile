# make run: train mnist_resnet with five points.
# make test: all tests.  make test-fast: those that take under a minute in total on 2 cores.  make lint: ruff and mypy.
# make test-gpu: those that need a GPU.
# make suite: all submissions on all workloads; run again, it goes on.  STUDIES=5: five seeds.  QUICK=1: two workloads.
# make examples: run the examples and the tests of frameworks in .venv-examples, with two processes where there can be any.
# make docs: build the pages in site/ with links checked, in an environment of their own, which needs no torch.
# TORCH=2.5.1 picks a torch version, in its own environment; without it, 2.13.0.
VENV := .venv$(if $(TORCH),-$(TORCH))
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: run suite test test-fast test-gpu lint examples docs clean
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

EXAMPLES := .venv-examples/bin
RANKS := $(EXAMPLES)/torchrun --standalone --nproc_per_node=2
# Run an example, and show its line, or all that it prints if it fails
example = @$(1) examples/$(2).py examples_out/$(2) > examples_out/$(2).log 2>&1 || { cat examples_out/$(2).log; exit 1; }; \
  grep "^$(2): " examples_out/$(2).log

examples: .venv-examples/installed
	rm -rf examples_out && mkdir examples_out
	$(call example,$(EXAMPLES)/python,plain)
	$(call example,$(RANKS),ddp)
	$(call example,$(RANKS),fsdp2)
	$(call example,$(RANKS),accelerate_loop)
	$(call example,$(RANKS),hf_trainer)
	$(call example,$(RANKS),lightning_module)
	@if $(EXAMPLES)/python -c "import timm" 2> /dev/null; then $(EXAMPLES)/python examples/timm_registration.py; \
	  else echo "timm_registration: skipped, since timm's torchvision does not fit torch"; fi
	$(EXAMPLES)/python -m pytest tests/test_integrations.py

# Where the torchvision that timm needs does not fit torch, both are removed: frameworks do not start with it
.venv-examples/installed: pyproject.toml
	$(PYTHON) -m venv .venv-examples
	$(EXAMPLES)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 -e '.[dev,examples]'
	$(EXAMPLES)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 -e '.[timm]'
	$(EXAMPLES)/python -c "import timm" 2> /dev/null || $(EXAMPLES)/python -m pip uninstall --quiet --yes timm torchvision
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
