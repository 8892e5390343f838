# `make` lists what there is. VENV=path keeps the environment elsewhere, PYTHON=python3.12 chooses
# the interpreter that makes it, MODEL=path measures another model than the small random one.

VENV ?= .venv
PYTHON ?= python3
MODEL ?=
ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.sglang-stream-setup
COMMAND := $(BIN)/sglang-stream
FLAGS := $(if $(MODEL),--model-path $(MODEL)) $(ARGS)

# Debian package = a file it brings, as the linker knows it. The first three are for moving KV
# between machines, the others for SGLang's kernels and their compilation, and nginx for the tests.
LIBRARIES := libibverbs1=libibverbs.so.1 librdmacm1=librdmacm.so.1 liburing2=liburing.so.2 \
             libnuma1=libnuma.so.1
PROGRAMS := numactl=numactl g++=c++ nginx=nginx

.DEFAULT_GOAL := help
.PHONY: help setup demo bench reproduce test test-long check

help: ## This list
	@grep -hE '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(STAMP) ## An environment with everything (in .venv, or VENV=path)

demo: $(STAMP) ## Ask about pages while they are still being fetched, against waiting (MODEL=path)
	$(COMMAND) demo $(FLAGS)

bench: $(STAMP) ## Time to first token by waiting, streaming and re-sending (MODEL=path)
	$(COMMAND) bench $(FLAGS)

reproduce: $(STAMP) ## The evaluation: simulated, small on this machine; report in reproduced/
	$(COMMAND) reproduce $(ARGS)

test: $(STAMP) ## Tests without the long ones
	$(BIN)/python -m pytest -m "not long" $(ARGS)

test-long: $(STAMP) ## All tests
	$(BIN)/python -m pytest $(ARGS)

check: $(STAMP) ## Format, lint, types, which module imports which, coverage of the policies
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_import_arrows.py
	$(BIN)/python -m pytest tests/sglang_stream/policy --cov=sglang_stream.policy --cov-fail-under=95

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "$(PYTHON) is not Python 3.10 or later: name one with PYTHON=..."; exit 1; }
	@$(SYSTEM_PACKAGES)
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "Python's venv is missing; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	@echo "Installing SGLang, PyTorch and the rest into $(VENV): some gigabytes, some minutes."
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@$(BIN)/python -m pip install --quiet -e ".[server,disaggregation,crawler,ann,experiments,bench,dev]"
	@touch $@

# Installs what is missing where that is ours to do, tells what to install elsewhere, and goes on
# in any case: one worker on a machine without an accelerator runs without them.
define SYSTEM_PACKAGES
PATH="$$PATH:/sbin:/usr/sbin"; missing=""; \
for pair in $(LIBRARIES); do \
  ldconfig -p 2>/dev/null | grep -q "$${pair#*=}" || missing="$$missing $${pair%%=*}"; \
done; \
for pair in $(PROGRAMS); do \
  command -v "$${pair#*=}" >/dev/null || missing="$$missing $${pair%%=*}"; \
done; \
$(PYTHON) -c 'import os, sysconfig as s; open(os.path.join(s.get_path("include"), "Python.h"))' \
  2>/dev/null || missing="$$missing python3-dev"; \
$(PYTHON) -c 'import ensurepip' 2>/dev/null || missing="$$missing python3-venv"; \
if [ -z "$$missing" ]; then :; \
elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
  echo "Installing system packages:$$missing"; export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1; \
  apt-get update -qq; \
  for package in $$missing; do \
    apt-get install -qq -y --no-install-recommends $$package >/dev/null || \
    echo "$$package was not installed: going on without"; \
  done; \
else \
  echo "System packages that are missing (going on without): sudo apt-get install$$missing"; \
fi
endef
