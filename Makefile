# make demo | make test | make lint | make clean. The first call builds .venv; later calls reuse it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Stamps live inside .venv, so removing it forgets them too.
TORCH_STAMP := $(VENV)/.stamp-torch
TRAIN_STAMP := $(VENV)/.stamp-train
TEST_STAMP := $(VENV)/.stamp-test

.PHONY: demo test lint clean

demo: $(TRAIN_STAMP)
	$(BIN)/python examples/demo.py

test: lint
	$(BIN)/python -m pytest -n 2 tests

lint: $(TEST_STAMP)
	$(BIN)/ruff check .

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch comes first and alone: the rest then accepts the installed build instead of choosing another one
$(TORCH_STAMP): | $(BIN)/python
	$(BIN)/python -m pip install torch==2.13.0
	touch $@

$(TRAIN_STAMP): $(TORCH_STAMP) setup.py pyproject.toml
	$(BIN)/python -m pip install -e ".[train]"
	touch $@

# the test extra contains the train extra
$(TEST_STAMP): $(TORCH_STAMP) setup.py pyproject.toml
	$(BIN)/python -m pip install -e ".[test]"
	touch $@ $(TRAIN_STAMP)

clean:
	rm -rf build dist *.egg-info outputs .pytest_cache tests/.pytest_cache .ruff_cache .hypothesis tests/.hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
