# make demo: a real Llama becomes linear on this machine. make test: what CI runs.
#
# PYTHON   the Python, 3.11 or newer, that makes the virtual environment
# TORCH    what pip installs for PyTorch; another build: TORCH='torch==2.12.0'
#          TORCH=system uses the PyTorch that PYTHON has already
# WORKERS  processes that run the tests; all cores unless given
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
OUT ?= out/demo
WORKERS ?= auto
# What comes trained with the package, and how often it and its teacher are asked at 16K tokens: a minute each time.
SHIPPED := smollm2-135m-longcontext
SAMPLES_16K ?= 3

BIN := $(VENV)/bin
ifeq ($(TORCH),system)
  VENV_OPTIONS := --system-site-packages
  INSTALL_TORCH := true
else
  INSTALL_TORCH := $(BIN)/python -m pip install --quiet '$(TORCH)'
endif

.PHONY: demo test test-gpu test-peers check clean help
help:
	@sed -n '1,8p' $(MAKEFILE_LIST)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV_OPTIONS) $(VENV)

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	@echo "installing PyTorch and lawcat into $(VENV), a minute or two"
	@$(INSTALL_TORCH)
	@$(BIN)/python -m pip install --quiet -e '.[demo]'
	@touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	@echo "installing PyTorch, lawcat and the test tools into $(VENV), a minute or two"
	@$(INSTALL_TORCH)
	@$(BIN)/python -m pip install --quiet -e '.[test,dev]'
	@touch $@

# Each step finds what is done already: run it again after an interruption, and it goes on.
demo: $(VENV)/.demo
	$(BIN)/lawcat linearize smollm2-135m-instruct $(OUT)/student --recipe quick --no-evaluate
	$(BIN)/lawcat linearize smollm2-135m-instruct $(OUT)/untrained --recipe quick --no-evaluate \
	  --set attention_transfer.steps=0 --set recovery.steps=0
	$(BIN)/lawcat eval smollm2-135m-instruct $(OUT)/untrained $(OUT)/student \
	  --tasks passkey,perplexity --lengths 256,1k,4k --samples 11 --perplexity-tokens 4096 --dtype fast \
	  --records $(OUT)/samples.jsonl --report $(OUT)/report
	$(BIN)/lawcat eval smollm2-135m-instruct $(SHIPPED) --tasks passkey --lengths 16k --samples $(SAMPLES_16K) \
	  --option passkey.depth=random --dtype fast --records $(OUT)/samples-16k.jsonl --report $(OUT)/report-16k

test: $(VENV)/.test
	@$(BIN)/python tests/peers/fetch.py || echo "the peers' test suites could not be fetched; their tests skip"
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

# On a machine with an NVIDIA GPU: the kernels on the device, with the shapes that an interpreter cannot do.
test-gpu: $(VENV)/.test
	$(BIN)/python -m pytest tests/ops tests/model tests/inference tests/distill -k "triton or gpu or graph"

check: $(VENV)/.test
	$(BIN)/ruff check src tests
	$(BIN)/ruff format --check src tests
	$(BIN)/mypy

clean:
	rm -rf $(VENV) out
