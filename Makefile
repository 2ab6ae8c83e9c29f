# Everything runs in .venv, which `make` fills on first use and again when what it is made from changes.
# Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_OUT ?= demo-out
ARGS ?=

PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt
REQUIREMENTS := pyproject.toml constraints.txt requirements-demo.txt
# One mark per Python version, so that another PYTHON makes the environment anew.
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
READY := $(VENV)/.ready-$(VERSION)
READY_DEV := $(VENV)/.ready-dev-$(VERSION)

.PHONY: help demo test lint format types spelling compatibility wheel clean

help:
	@echo 'make demo      set up, run studies on real photographs and generated scenes, write reports into $(DEMO_OUT)/'
	@echo 'make test      set up and run the tests (ARGS="-k name" for some of them)'
	@echo 'make lint      check style and formatting; make format: put both right'
	@echo 'make types     check types'
	@echo 'make spelling  check spelling'
	@echo 'make compatibility  measure every example of a family anew, into docs/compatibility.md'
	@echo 'make wheel     build the wheel and the source distribution into dist/'
	@echo 'make clean     remove the environment, caches and built files'

demo: $(READY)
	@echo '== Running studies on embedded models, photographs and scenes; results go into $(DEMO_OUT)/'
	$(BIN)/attnscope demo --out $(DEMO_OUT)

test: $(READY_DEV)
	@echo '== Running the tests in two processes'
	$(BIN)/python -m pytest -n 2 --dist loadgroup $(ARGS)

lint: $(READY_DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY_DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(READY_DEV)
	$(BIN)/mypy

spelling: $(READY_DEV)
	$(BIN)/codespell

compatibility: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m attnscope.compatibility docs/compatibility.md

wheel: $(READY_DEV)
	$(BIN)/python -m hatchling build

clean:
	rm -rf $(VENV) build dist demo-out .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(READY): $(REQUIREMENTS)
	@echo '== Setting up $(VENV) (the first time about 2 GB and a few minutes, most of it PyTorch)'
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo 'attnscope needs Python 3.11 or newer; name one with: make PYTHON=python3.12'; exit 1; }
	@test "$$($(BIN)/python -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" = '$(VERSION)' \
		|| $(PYTHON) -m venv --clear $(VENV) \
		|| { echo 'could not make $(VENV); on Debian and Ubuntu: apt-get install python3-venv'; exit 1; }
	$(PIP_INSTALL) --editable '.[extract,report,flows]'
	$(PIP_INSTALL) --no-deps --requirement requirements-demo.txt
	@touch $@

$(READY_DEV): $(READY)
	@echo '== Adding what the tests and checks need'
	$(PIP_INSTALL) --editable '.[dev]'
	@touch $@
