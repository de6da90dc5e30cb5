# The README's two commands are `make demo` and `make test`; everything they need is made here.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp-dev
ACCELERATORS := .venv-accelerators
STAMP_RUN := $(VENV)/.stamp-run

.PHONY: demo test test-accelerators check bench clean install

# One environment; filled again when the requirements change. The demo needs one backend only, the
# tests all of them (three times the download).
$(STAMP_RUN): EXTRA := onnxruntime,image
$(STAMP): EXTRA := dev
$(STAMP) $(STAMP_RUN): setup.cfg pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(EXTRA)]'
	@touch $@

install: $(STAMP)

demo: $(STAMP_RUN)
	@$(BIN)/python -m examples.demo

# As root on Debian, the packages that some tests need are installed; elsewhere those tests are
# skipped by name and counted at the end.
test: $(STAMP)
	@sh packaging/test-packages.sh
	@$(BIN)/python -m pytest -n 2 --dist loadgroup tests

# Execution providers that are plug-ins, one with an emulated accelerator: 0.4 GB, so in an
# environment of their own.
$(ACCELERATORS)/.stamp: setup.cfg pyproject.toml
	@test -x $(ACCELERATORS)/bin/python || $(PYTHON) -m venv $(ACCELERATORS)
	@echo "installing into $(ACCELERATORS) ..."
	@$(ACCELERATORS)/bin/python -m pip install --quiet --disable-pip-version-check \
	  --editable '.[accelerators]'
	@touch $@

test-accelerators: $(ACCELERATORS)/.stamp
	@$(ACCELERATORS)/bin/python -m pytest tests/accelerators

check: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

bench: $(STAMP)
	@$(BIN)/python -c 'import matplotlib, fastapi, uvicorn, httptools, uvloop' 2>/dev/null || \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]' || \
	  echo "no plot or no FastAPI: the extra 'bench' could not be installed"
	@$(BIN)/python -m bench

clean:
	rm -rf $(VENV) $(ACCELERATORS) build dist out *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
