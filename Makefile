# Everything works from a fresh clone: the first target that needs it makes .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: ablation test check smoke ui bench notebooks notebooks-clean clean

ablation: $(READY)
	$(BIN)/python tuning/run_ablation.py

test: $(READY)
	$(BIN)/python -m pytest

check: $(READY)
	$(BIN)/ruff check llgbm tuning tests dnd_repo notebooks
	$(BIN)/ruff format --check llgbm tuning tests dnd_repo notebooks
	$(BIN)/mypy

smoke: $(READY)
	$(BIN)/python tuning/run_ablation.py --smoke --experiment llgbm-smoke

ui: $(READY)
	$(BIN)/mlflow ui --backend-store-uri sqlite:///$(CURDIR)/mlruns/mlflow.db --host 127.0.0.1 --port 5000

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

clean:
	rm -rf $(VENV) .llgbm mlruns
