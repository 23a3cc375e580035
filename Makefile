# make demo: train a small language model dense and 2:4 sparse, compress it, run it compressed.
# make test: the tests and doctests.   make lint: format, lint, types.
# Each makes a virtual environment of its own the first time. PYTHON=... and VENV=... choose others.

PYTHON ?= python3
VENV ?= .venv
REQUIRE ?=
BIN := $(VENV)/bin

.PHONY: demo test lint clean

# glibc would give the memory of every step back and take it again, which costs a third of the time on a CPU
demo: $(VENV)/examples
	MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=536870912 $(BIN)/python -m jaxsparse.examples.char_lm

test: $(VENV)/test
	$(BIN)/python -m pytest -n auto --maxprocesses 8

lint: $(VENV)/test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

$(VENV)/%: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[$*]' $(REQUIRE)
	touch $@

clean:
	rm -rf .venv*
