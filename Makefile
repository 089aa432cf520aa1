# Everything works from a fresh clone: the first target that needs it makes .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: ablation test check smoke ui bench clean

ablation: $(READY)
	$(BIN)/python tuning/run_ablation.py

test: $(READY)
	$(BIN)/python -m pytest

check: $(READY)
	$(BIN)/ruff check llgbm tuning tests
	$(BIN)/ruff format --check llgbm tuning tests
	$(BIN)/mypy

smoke: $(READY)
	$(BIN)/python tuning/run_ablation.py --smoke --experiment llgbm-smoke

ui: $(READY)
	$(BIN)/python -m tuning.ui

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .llgbm mlruns
