# The README's two commands are `make demo` and `make test`; everything they need is made here.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp-dev
ACCELERATORS := .venv-accelerators
TFLITE := .venv-tflite
PAIRS := .venv-pairs
QUANTIZE := .venv-quantize
QUANTIZE_STAMP := $(QUANTIZE)/.stamp-$(or $(TORCH),plain)
STAMP_RUN := $(VENV)/.stamp-run

.PHONY: demo test test-tflite test-pairs test-accelerators test-quantize check bench soak clean install

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
	@if ! $(BIN)/python -c '$(HAS_TFLITE)'; then \
	  echo "not run: test-tflite (tflite-runtime has wheels for Python 3.11 on Linux x86_64, aarch64, armv7l)"; \
	elif ! $(MAKE) --no-print-directory PYTHON=$(BIN)/python $(TFLITE)/.stamp; then \
	  echo "not run: test-tflite (tflite-runtime could not be installed)"; \
	else $(MAKE) --no-print-directory test-tflite; fi

# The backend litert on tflite-runtime instead of LiteRT: it needs numpy 1, so an environment of its
# own (0.1 GB).
HAS_TFLITE := import platform, sys; ok = sys.version_info[:2] == (3, 11) and \
  platform.machine() in ("x86_64", "aarch64", "armv7l"); sys.exit(not ok)
$(TFLITE)/.stamp: setup.cfg pyproject.toml
	@test -x $(TFLITE)/bin/python || $(PYTHON) -m venv $(TFLITE)
	@echo "installing into $(TFLITE) ..."
	@$(TFLITE)/bin/python -m pip install --quiet --disable-pip-version-check \
	  --editable '.[tflite]' 'pytest>=8'
	@touch $@

test-tflite: $(TFLITE)/.stamp
	@$(TFLITE)/bin/python -m pytest -k "litert or tflite" tests/backends/test_contract.py \
	  tests/backends/test_litert.py tests/daemon/test_litert.py

# One bundle with two files that are silently wrong, each on one library, and both libraries here:
# tflite-runtime beside onnxruntime and OpenVINO, on numpy 1 (0.4 GB).
$(PAIRS)/.stamp: setup.cfg pyproject.toml
	@test -x $(PAIRS)/bin/python || $(PYTHON) -m venv $(PAIRS)
	@echo "installing into $(PAIRS) ..."
	@$(PAIRS)/bin/python -m pip install --quiet --disable-pip-version-check \
	  --editable '.[tflite,onnxruntime,openvino,image]' 'pytest>=8' onnx hypothesis
	@touch $@

test-pairs: $(PAIRS)/.stamp
	@$(PAIRS)/bin/python -m pytest tests/selection/test_gate.py

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

# Every library that quantizes, and a Ray cluster of this machine: 1.1 GB, so in an environment of
# their own. TORCH=1 adds torch (0.8 GB) and the tests of torch as a source and of training
# again after pruning; TORCH=litert also what makes .tflite of torch (2.2 GB). Each has a stamp, so
# that it is installed where the others are there already.
$(QUANTIZE_STAMP): setup.cfg pyproject.toml
	@test -x $(QUANTIZE)/bin/python || $(PYTHON) -m venv $(QUANTIZE)
	@echo "installing into $(QUANTIZE) ..."
	@$(QUANTIZE)/bin/python -m pip install --quiet --disable-pip-version-check \
	  --editable '.[dev,quantize-openvino,quantize-litert,quantize-ray$(if $(TORCH),$(comma)quantize-torch)$(if $(filter litert,$(TORCH)),$(comma)quantize-torch-litert)]'
	@touch $@

comma := ,
test-quantize: $(QUANTIZE_STAMP)
	@$(QUANTIZE)/bin/python -m pytest tests/quantize

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

# 1,000 swaps and 200 rollbacks under load in one run: ten minutes at most, report in out/soak/.
soak: $(STAMP)
	@$(BIN)/python -m bench --only soak --out out/soak

clean:
	rm -rf $(VENV) $(ACCELERATORS) $(TFLITE) $(PAIRS) $(QUANTIZE) build dist out *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
