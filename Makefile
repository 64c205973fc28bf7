# Every target sets up .venv first: the pinned dependencies of constraints.txt, then the package.
# torch by itself and first: its pinned version is a CPU build where pip finds one.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check --quiet
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
	.wheel-venv/bin/python -m pip --disable-pip-version-check --quiet install -c constraints.txt torch
	.wheel-venv/bin/python -m pip --disable-pip-version-check --quiet install -c constraints.txt dist/*.whl
	cd dist && for name in collect-traces train-estimator export-estimator foreroute; do \
		../.wheel-venv/bin/$$name --help > /dev/null || exit 1; done
	cd dist && ../.wheel-venv/bin/foreroute generate --prompt "def parse(" --max-new-tokens 8

$(READY): pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt -e ".[dev]"
	touch $(READY)

clean:
	rm -rf $(VENV) .wheel-venv dist build demo-out *.egg-info
