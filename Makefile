# Every target sets up .venv first: the pinned dependencies of constraints.txt, then the package.
# torch by itself and first: its pinned version is a CPU build where pip finds one.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# Only what is imported is compiled to bytecode, when it is: all that is installed takes a minute.
PIP_INSTALL = -m pip --disable-pip-version-check --quiet install --no-compile -c constraints.txt
READY = $(VENV)/.ready
CODE = estimators data train export runtime tests benchmarks examples

.PHONY: demo test lint format check wheel clean

demo: $(READY)
	$(BIN)/foreroute tune --model bundled --out demo-out --tokens 49152 --prompt "def read_config(path):"

test: $(READY)
	$(BIN)/python -m pytest -n 2

check: lint test

lint: $(READY)
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

# Builds the wheel, installs it in an environment of its own, and runs the console scripts from it.
wheel: $(READY)
	rm -rf dist build .wheel-venv
	$(BIN)/python -m build --wheel --outdir dist > /dev/null
	$(PYTHON) -m venv .wheel-venv
	.wheel-venv/bin/python $(PIP_INSTALL) torch
	.wheel-venv/bin/python $(PIP_INSTALL) dist/*.whl
	cd dist && for name in collect-traces train-estimator export-estimator foreroute; do \
		../.wheel-venv/bin/$$name --help > /dev/null || exit 1; done
	cd dist && ../.wheel-venv/bin/foreroute generate --prompt "def parse(" --max-new-tokens 8

$(READY): pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP_INSTALL) torch
	$(BIN)/python $(PIP_INSTALL) -e ".[dev]"
	touch $(READY)

clean:
	rm -rf $(VENV) .wheel-venv dist build demo-out *.egg-info
