# make run    start the service on http://127.0.0.1:8000 with the demonstration model; Ctrl-C ends everything it started
# make test   lint, types, import contracts and tests
# make loadtest   a short open-loop load test of a service that runs on PORT; RATE=2 requests/s, DURATION=30 s
# make replay-benchmark   cost of the autoscaling policy against a clairvoyant plan on two weeks of real traffic; ten minutes
# make audit  look up every pinned dependency in the advisory databases; what cannot be looked up counts as not audited (status 2);
#             AUDIT_ARGS="--vulnerability-service osv --osv-url URL" asks a mirror of your own
# make clean  remove what the others made
#
# Both make a virtual environment in .venv and install the versions of constraints.txt into it; the second time they only start.
#   PORT=8001                     another port
#   CONFIG=cluster_configs/...    another Serve YAML
#   PYTHON=python3.12             another interpreter (3.11 or newer)
#   WORKERS=4                     processes of the tests; as many as there are cores by default
#   PIP_ARGS="--index-url ..."    options for pip, such as an index that has the CPU build of torch (or a CUDA build)

PYTHON   ?= python3
PORT     ?= 8000
CONFIG   ?= cluster_configs/serve/local-cpu.yaml
PIP_ARGS ?=
AUDIT_ARGS ?=
WORKERS  ?= auto
RATE     ?= 2
DURATION ?= 30
VENV     := .venv
BIN      := $(VENV)/bin

# One torch thread: two on a busy machine are many times slower.
export OMP_NUM_THREADS := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help run test loadtest replay-benchmark audit clean

help:
	@awk '/^#/ { sub(/^# ?/, ""); print; next } { exit }' Makefile

run: $(VENV)/.installed-run
	@exec $(BIN)/babelephant serve $(CONFIG) --port $(PORT)

test: $(VENV)/.installed-test
	@echo "== ruff";         $(BIN)/ruff check . && $(BIN)/ruff format --check --quiet .
	@echo "== mypy";         $(BIN)/mypy
	@echo "== lint-imports"; $(BIN)/lint-imports
	@echo "== pytest";       $(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=15 \
	  -m 'not gpu and not cluster and not real_time'
	@echo "== pytest, alone"; $(BIN)/pytest --durations=5 -m 'real_time and not gpu and not cluster'

loadtest: $(VENV)/.installed-test
	@$(BIN)/python -m loadtest run --url http://127.0.0.1:$(PORT) --rate $(RATE) --duration $(DURATION)

replay-benchmark: $(VENV)/.installed-run
	@$(BIN)/python -m app.cost.benchmark

audit: $(VENV)/.installed-test
	@$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e ".[audit]"
	@$(BIN)/python -m tests.dependency_audit $(AUDIT_ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis

# The stamps are newer than everything that decides what is installed, so that a second start installs nothing.
$(VENV)/.installed-run: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing the service (a few minutes the first time) ..."
	@$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing the service and its tests (a few minutes the first time) ..."
	@$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e ".[test]"
	@touch $@ $(VENV)/.installed-run

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found; install Python 3.11 or newer, or: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "$(PYTHON) is older than 3.11; install Python 3.11 or newer, or: make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null \
	  || { echo "$(PYTHON) cannot make virtual environments; on Debian and Ubuntu: sudo apt install python3-venv"; exit 1; }
	@$(PYTHON) -m venv $(VENV)
