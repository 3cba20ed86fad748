# `make demo` and `make test` are all a newcomer needs: each makes .venv, installs, and runs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

$(VENV)/demo.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[demo]'
	touch $@

$(VENV)/dev.stamp: $(VENV)/demo.stamp
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

.PHONY: demo test check chaos docs bench golden clean

demo: $(VENV)/demo.stamp  ## train a small model on Shakespeare on the CPU and show what it can do (two minutes after installing)
	$(BIN)/recurlm demo

test: $(VENV)/dev.stamp  ## every test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

check: $(VENV)/dev.stamp  ## what CI runs: format, lint, types, import layers, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(MAKE) test

chaos: $(VENV)/dev.stamp  ## the fault tests at full count (an hour or more); figures are kept in chaos.jsonl
	RECURLM_CHAOS=1 RECURLM_CHAOS_LOG=$(CURDIR)/chaos.jsonl OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m chaos

docs: $(VENV)/dev.stamp  ## the generated page
	$(BIN)/python -m recurlm.config > docs/configuration.md

bench: $(VENV)/dev.stamp  ## every measurement that this machine can run, kept in bench/results/, and memory of stores
	$(BIN)/recurlm bench -o bench/results
	$(BIN)/python bench/store_memory.py

golden: $(VENV)/dev.stamp  ## write the golden loss traces anew: a change of numerics, in its own commit, saying why
	RECURLM_WRITE_GOLDEN=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/training/test_run.py tests/training/test_old_checkpoints.py -k 'golden or measures'

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
