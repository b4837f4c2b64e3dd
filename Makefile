# Two commands on a fresh machine:  make demo   (train, grow, compare a small real model)    make test   (every test)
PYTHON ?= python3
VENV ?= .venv
# On a GPU machine, or to take another build of torch:  make TORCH=torch
TORCH ?= torch==2.13.0
DEMO ?= demo
SITE ?= site
DEMO_SECONDS ?= 75
TEST_PROCESSES ?= 2
BIN := $(VENV)/bin
TEXT = $(shell $(BIN)/python -c "import sysconfig; print(sysconfig.get_path('stdlib') + '/argparse.py')")

# Two torch threads collapse when cores are contended, unless idle ones sleep.
export OMP_WAIT_POLICY := PASSIVE

.PHONY: demo test lint docs clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@

demo: $(VENV)/.installed
	@rm -rf $(DEMO)
	OMP_NUM_THREADS=2 $(BIN)/python -m gdagrow.train.demo $(DEMO)/source --seconds $(DEMO_SECONDS)
	$(BIN)/gdagrow inspect $(DEMO)/source
	$(BIN)/gdagrow expand $(DEMO)/source $(DEMO)/signal-x2 --signal-x2
	$(BIN)/gdagrow expand $(DEMO)/source $(DEMO)/uniform-x2 --uniform-x2
	$(BIN)/gdagrow diff $(DEMO)/source $(DEMO)/signal-x2 --text $(TEXT)
	$(BIN)/gdagrow diff $(DEMO)/source $(DEMO)/uniform-x2 --text $(TEXT)

# A file's tests stay in one process, whose fixtures train models; the long files, e2e, come first.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --dist loadscope --no-loadscope-reorder

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed-docs
	$(BIN)/python -m typer gdagrow_cli.main utils docs --name gdagrow --output docs/cli.md
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going docs $(SITE)
	@echo "open $(SITE)/index.html"

clean:
	rm -rf $(VENV) $(DEMO) $(SITE)
