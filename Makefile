# Everything works from a fresh clone: the first target that needs it makes .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: ablation test test-whole test-oldest test-gpu check smoke soak bench bench-check bench-gpu same-numbers ui notebooks notebooks-clean clean

ablation: $(READY)
	$(BIN)/python tuning/run_ablation.py

test: $(READY)
	$(BIN)/python -m pytest

# Whole programs, each for seconds to minutes: sweeps, servers, notebooks, the README's own commands.
test-whole: $(READY)
	$(BIN)/python -m pytest -m 'whole and not gpu and not slow and not network'

check: $(READY)
	$(BIN)/ruff check llgbm tuning tests dnd_repo benchmarks notebooks
	$(BIN)/ruff format --check llgbm tuning tests dnd_repo benchmarks notebooks
	$(BIN)/mypy

smoke: $(READY)
	$(BIN)/python tuning/run_ablation.py --smoke --experiment llgbm-smoke

# What takes too long for `test`: fifty random kills of drivers, workers and machines, among others.
soak: $(READY)
	$(BIN)/python -m pytest -n 0 -s -m slow

# What needs a CUDA device; the rest of the tests does not.
test-gpu: $(READY)
	$(BIN)/python -m pytest -n 0 -m gpu

# Each prints one JSON line and writes benchmarks/results/ (from a clean tree; else benchmarks/results/scratch/).
bench: $(READY)
	for script in $(filter-out %/bench_gpu.py,$(wildcard benchmarks/bench_*.py)); do $(BIN)/python $$script || exit 1; done

# The quick CPU ratios again: fails where one falls below 80 % of the committed result.
bench-check: $(READY)
	$(BIN)/python benchmarks/check.py

bench-gpu: $(READY)
	$(BIN)/python benchmarks/bench_gpu.py

# Every metric of a short sweep, bit by bit, beside that of an earlier commit: make same-numbers BASE=main
BASE ?= HEAD~1
same-numbers: $(READY)
	$(BIN)/python benchmarks/same_numbers.py --base $(BASE)

ui: $(READY)
	$(BIN)/python -m tuning.ui

# Pages with pictures for docs/, from a real run: phase 4.5 reads the study that `make ablation` left.
notebooks: $(READY)
	rm -rf docs/notebooks
	PYTHONWARNINGS=ignore $(BIN)/python -m nbconvert --to markdown --execute --output-dir docs/notebooks notebooks/*.ipynb

notebooks-clean: $(READY)
	$(BIN)/python -m nbconvert --clear-output --inplace notebooks/*.ipynb

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

# The oldest libraries that pyproject.toml allows, but for torch, which stays the one of constraints.txt: wheels of 2.5
# cannot be had for every Python that is allowed. tests/product/test_oldest.py holds the code to the names that torch 2.5 has.
OLDEST := .venv-oldest
CORE_TESTS := tests/llgbm tests/dnd tests/product/test_oldest.py

test-oldest: $(OLDEST)/.ready
	$(OLDEST)/bin/python -m pytest -c tests/oldest.ini --rootdir . $(CORE_TESTS)

$(OLDEST)/.ready: pyproject.toml constraints.txt constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install -q -c constraints.txt torch
	$(OLDEST)/bin/python -m pip install -q -r constraints-oldest.txt
	$(OLDEST)/bin/python -m pip install -q --no-deps -e .
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) .llgbm mlruns
