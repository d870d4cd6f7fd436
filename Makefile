# The two commands of the README: `make demo` and `make test`. Each sets up everything that it needs.
# TORCH_INDEX=URL names a package index that is asked beside the usual one, such as that of torch's smaller CPU build.
PYTHON ?= python3
TORCH_INDEX ?=
# Of `make gpu`: the options of `python -m experiments.benchmark.gpu_check`, such as '--minutes 7 --output FOLDER'.
OPTIONS ?=
BIN := .venv/bin
UV ?= $(shell command -v uv)
WANTED := --constraint constraints.txt $(if $(TORCH_INDEX),--extra-index-url '$(TORCH_INDEX)') --editable '.[dev]'

.PHONY: install shell options demo gpu test test_slow small_changes lint format

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name one by: make PYTHON=python3.11 install" >&2; exit 2; }
	@echo "Installing into .venv, with $(if $(UV),uv,pip), once: $(if $(TORCH_INDEX),torch from $(TORCH_INDEX) if it has it,\
		7.4 GB), 2 minutes near a package index, longer over a slow line. It may be interrupted and repeated."
ifneq ($(UV),)
	$(UV) venv --quiet --allow-existing --python $(PYTHON) .venv
	$(UV) pip install --quiet --index-strategy unsafe-best-match --python $(BIN)/python $(WANTED)  # the newest, as pip
else
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(WANTED)
endif
	@touch $@

shell: install
	@echo "frcnn is found in this shell; exit leaves it"
	@VIRTUAL_ENV="$(CURDIR)/.venv" PATH="$(CURDIR)/.venv/bin:$$PATH" "$${SHELL:-/bin/sh}"

options: install
	$(BIN)/python -m experiments.run.training_options

demo: install
	$(BIN)/python -m experiments.run.demo

# With PYTHON=... on the command line, by that Python as it is: nothing is installed.
gpu: $(if $(filter command line,$(origin PYTHON)),,install)
	$(if $(filter command line,$(origin PYTHON)),$(PYTHON),$(BIN)/python) -m experiments.benchmark.gpu_check $(OPTIONS)

test: lint
	$(BIN)/python -m pytest -n auto --dist worksteal

test_slow: install
	$(BIN)/python -m pytest -m slow

faults: install
	$(BIN)/python -m pytest -m slow -s tests/faults

small_changes: install
	$(BIN)/python tests/small_changes.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
