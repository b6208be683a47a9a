# make demo | make test | make trust | make docs | make test-oldest | make lint | make clean. The first call builds
# .venv; later calls reuse it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# the oldest supported Transformers has an environment of its own
OLDEST := .venv-oldest
OLDEST_STAMP := $(OLDEST)/.stamp-test

# Stamps live inside .venv, so removing it forgets them too.
TORCH_STAMP := $(VENV)/.stamp-torch
TRAIN_STAMP := $(VENV)/.stamp-train
TEST_STAMP := $(VENV)/.stamp-test
DOCS_STAMP := $(VENV)/.stamp-docs

.PHONY: demo test trust test-oldest docs lint clean

demo: $(TRAIN_STAMP)
	$(BIN)/python examples/demo.py

test: lint
	$(BIN)/python -m pytest -n 2 tests

# ten thousand damaged files, configs and interruptions; SEED=N repeats a run
SEED ?= $(shell date +%s)
trust: $(TEST_STAMP)
	@echo "SEED=$(SEED)"
	MC_TRUST_EXAMPLES=3500 $(BIN)/python -m pytest -n 2 tests/trust --timeout=0 --hypothesis-seed=$(SEED)

test-oldest: $(OLDEST_STAMP)
	$(OLDEST)/bin/python -m pytest -n 2 tests

# the documentation site, in build/site: a warning is an error
docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(TEST_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	# it takes the names of modules from the names of folders, and the clone may have any
	mkdir -p build/lint && ln -sfn $(CURDIR) build/lint/mc_transformers
	PYTHONPATH=$(CURDIR)/build/lint $(BIN)/lint-imports --no-cache

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

$(DOCS_STAMP): $(TORCH_STAMP) setup.py pyproject.toml
	$(BIN)/python -m pip install -e ".[docs]"
	touch $@

$(OLDEST_STAMP): setup.py pyproject.toml
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install torch==2.13.0
	$(OLDEST)/bin/python -m pip install "transformers==5.16.*"
	$(OLDEST)/bin/python -m pip install -e ".[test]"
	touch $@

# what was trained into other folders of outputs/ stays
clean:
	rm -rf build dist *.egg-info outputs/demo .pytest_cache tests/.pytest_cache .ruff_cache .hypothesis tests/.hypothesis
	find . -name __pycache__ -type d -not -path './.venv*/*' -prune -exec rm -rf {} +
