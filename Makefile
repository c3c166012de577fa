# `make test` sets up all it needs in .venv and passes the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: setup check test soak clean

setup: $(VENV)/.installed

# torch first and pinned: a machine with a GPU gets the CUDA build from the same pin.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) --editable '.[dev]'
	touch $@

check: setup  ## format, lint, types, import layers, fast tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q -m 'not ray and not s3 and not gpu and not soak'

test: setup  ## everything that needs no GPU and does not take long
	$(BIN)/python -m pytest -m 'not gpu and not soak'

soak: setup  ## what takes long
	$(BIN)/python -m pytest -m soak

clean:
	rm -rf $(VENV) build dist
