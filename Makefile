# make demo: set up, run every phase on the embedded default, build reports/index.html
# make test: set up, pass all tests        make lab: open JupyterLab        make setup: the set-up alone
# Needs Python 3.11 to 3.13 and nothing else; no root. PYTHON=/path/to/python chooses the interpreter.

VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.ready
FIT    := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c '$(FIT)' >/dev/null 2>&1 && { echo $$p; break; }; done)

.PHONY: demo test lab setup lint clean

demo: $(STAMP)
	$(BIN)/tinyonn all

# One OpenMP thread per worker: two that share a core run many times slower than one.
test: $(STAMP)
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist loadfile

lab: $(STAMP)
	$(BIN)/tinyonn lab

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/tinyonn sync --check

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 is needed; install one or give PYTHON=/path/to/python."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "Cannot make a virtual environment: install your system's python3-venv package."; exit 1; }
	@echo "Installing into $(VENV): two to three minutes, about 3 GB."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,nf4,gguf,train,align]'
	@touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache
