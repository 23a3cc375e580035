# make demo: train a small language model dense and 2:4 sparse, compress it, run it compressed.
# make smollm: prune SmolLM2-135M 2:4 by three methods, and run it compressed (downloads 93 MB once).
# make test: the tests and doctests.   make lint: format, lint, types.   make docs: the documentation, into docs/_build/html.
# make notebooks: run them all and keep their outputs.
# Each makes a virtual environment the first time. Tests and documentation have their own: the tests need the CUDA
# plugin, about which jax warns on machines without a GPU. PYTHON=... and VENV=... choose others, and PYTEST=... gives
# pytest further arguments.

PYTHON ?= python3
VENV ?= .venv
REQUIRE ?=
PYTEST ?=
TESTS := $(VENV)-test
DOCS := $(VENV)-docs

.PHONY: demo smollm notebooks test lint docs clean

# glibc would give the memory of every step back and take it again
demo: $(VENV)/examples
	MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=536870912 $(VENV)/bin/python -m jaxsparse.examples.char_lm

smollm: $(VENV)/llm
	$(VENV)/bin/python -m jaxsparse.examples.smollm

# of metadata only the kernel and the language stay, so that a run changes outputs alone
notebooks: $(VENV)/notebooks
	$(VENV)/bin/python -m nbconvert --to notebook --execute --inplace --log-level WARN \
	  --ClearMetadataPreprocessor.enabled=True --ClearMetadataPreprocessor.preserve_nb_metadata_mask="{'kernelspec', ('language_info', 'name')}" \
	  --NotebookExporter.preprocessors=nbconvert.preprocessors.CoalesceStreamsPreprocessor notebooks/*.ipynb

test: $(TESTS)/test
	$(TESTS)/bin/python -m pytest -n auto --maxprocesses 8 $(PYTEST)

lint: $(TESTS)/test
	$(TESTS)/bin/ruff format --check .
	$(TESTS)/bin/ruff check .
	$(TESTS)/bin/mypy

# any warning fails it: a broken link, or a public name without a docstring
docs: $(DOCS)/docs
	$(DOCS)/bin/python -m sphinx --fail-on-warning --keep-going --nitpicky --quiet docs docs/_build/html

$(VENV)/examples $(VENV)/llm $(VENV)/notebooks $(TESTS)/test $(DOCS)/docs: pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check --editable '.[$(@F)]' $(REQUIRE)
	touch $@

clean:
	rm -rf .cache .venv* docs/_build
