# `make demo`, `make test` and `make test-long` need Python 3.11 or newer and a package index; everything goes into .venv.
# The packages take the pinned versions of constraints.txt. On Linux, PyPI's torch brings CUDA along; without a GPU
#   make demo PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
# downloads far less.

PYTHON ?= python3
BIN := .venv/bin
NOW := $(shell date +%Y%m%d-%H%M%S)
OUT ?= runs/demo-$(NOW)
# Flags of the two trainings of `make demo`: shorter ones than by default, so that all ends within ten minutes.
LASRO ?= --set train.updates=100
DRAFT ?= --set train.updates=190

.DEFAULT_GOAL := help
.PHONY: help demo test test-long lint docs site notebook

help:
	@echo "make demo   install and train LaSRO and DRaFT side by side on attribute binding, from the embedded model, and"
	@echo "            show side by side what they changed (a new folder in runs/)"
	@echo "make test   install and run all checks: ruff, mypy, pytest"
	@echo "make test-long"
	@echo "            install and run the tests that make test leaves out because they take long"
	@echo "make lint   ruff and mypy alone"
	@echo "make docs   write the generated parts and the figures of docs/ again"
	@echo "make notebook"
	@echo "            run examples/quickstart.ipynb again and keep its outputs"
	@echo "make site   build the pages of docs/ into site/, to read in a browser; a broken link is an error"

demo: .venv/.installed
	@$(BIN)/python examples/demo.py $(OUT) --lasro='$(LASRO)' --draft='$(DRAFT)'

# Two processes of one thread: the networks of the tests are so small that a second thread mostly waits for the first.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-long: .venv/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m long

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: .venv/.installed-dev
	$(BIN)/python docs/generate.py

# docs/ holds an extension that the build imports.
site: .venv/.installed-dev
	PYTHONPATH=docs $(BIN)/python -m zensical build --strict --clean
	@echo "open site/index.html through a server, so that the search works: $(BIN)/python -m http.server -d site"

# tqdm would put a warning with a path of this machine into the notebook.
notebook: .venv/.installed-dev
	PYTHONWARNINGS='ignore:IProgress not found' $(BIN)/jupyter execute --inplace --NotebookClient.record_timing=False \
	  examples/quickstart.ipynb

# Stamps, so that a second call installs nothing; a change of pyproject.toml or constraints.txt installs again.
.venv/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $(PYTHON) is not Python 3.11 or newer; name one that is: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; \
	  exit 1; }
	$(PYTHON) -m venv .venv
	@touch $@

.venv/.installed: pyproject.toml constraints.txt .venv/.made
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e .
	@touch $@

.venv/.installed-dev: pyproject.toml constraints.txt .venv/.made
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[datasets,dev,docs,faiss,parquet,tensorboard]'
	@touch $@ .venv/.installed
