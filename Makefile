# make lab    install everything into .venv, open JupyterLab on the first notebook
# make test   install, then: ruff, unit tests, every notebook compared, the browser
# make peers  compare live with llama.cpp and others (builds llama-cpp-python the first time: 6 to 8 minutes)
# Another interpreter: make lab PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NBVAL := --nbval --nbval-sanitize-with notebooks/sanitize.cfg --nbval-current-env --nbval-cell-timeout=120

# Two OpenMP processes that spin on two cores slow each other twentyfold; sleeping at barriers costs almost nothing.
export OMP_WAIT_POLICY := PASSIVE
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: lab test lint unit notebooks browser peers bench refresh wheel clean help

lab: $(VENV)/.lab
	$(BIN)/llmlab lab

test: lint unit notebooks browser

lint: $(VENV)/.test
	$(BIN)/ruff check .

unit: $(VENV)/.test
	$(BIN)/python -m pytest tests

notebooks: $(VENV)/.test
	$(BIN)/python -m pytest notebooks $(NBVAL)

browser: $(VENV)/.test
	$(BIN)/python -m pytest tests/browser

peers: $(VENV)/.peers
	$(BIN)/python -m pytest tests/peers

bench: $(VENV)/.peers
	$(BIN)/python -m pytest tests/bench -s

# Executes every notebook in place; widget state, timings and what is only true of this machine stay out of the files.
refresh: $(VENV)/.test
	$(BIN)/jupyter nbconvert --to notebook --execute --inplace --ExecutePreprocessor.timeout=120 \
	  --ExecutePreprocessor.store_widget_state=False --ExecutePreprocessor.record_timing=False notebooks/*.ipynb
	$(BIN)/jupyter nbconvert --to notebook --inplace --TagRemovePreprocessor.enabled=True \
	  --TagRemovePreprocessor.remove_all_outputs_tags=nbval-ignore-output notebooks/*.ipynb

wheel: $(VENV)/.test
	$(BIN)/python -m build --no-isolation

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache

help:
	@sed -n '1,4s/^# //p' Makefile

LLAMA = $(shell sed -n 's/.*"llama-cpp-python==\([0-9.]*\)".*/\1/p' pyproject.toml)
KEPT := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/llmlab/wheels

# A file in .venv per kind of install: a second call does nothing until pyproject.toml changes.
$(VENV)/.lab: EXTRAS :=
$(VENV)/.test: EXTRAS := [test]
$(VENV)/.peers: EXTRAS := [test,peers]

$(VENV)/.lab $(VENV)/.test $(VENV)/.peers: $(VENV)/.made pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.$(EXTRAS)'
	@touch $@

# llama.cpp with its RPC backend, which other wheels lack, also the one that pip may keep: built once, in a folder of its own.
$(VENV)/.peers: $(VENV)/.llama
$(VENV)/.llama: $(VENV)/.made pyproject.toml
	@ls '$(KEPT)'/llama_cpp_python-$(LLAMA)-*.whl >/dev/null 2>&1 || CMAKE_ARGS="$$CMAKE_ARGS -DGGML_RPC=ON" $(BIN)/python -m pip wheel \
	  --quiet --no-cache-dir --no-deps --no-binary llama-cpp-python --wheel-dir '$(KEPT)' llama-cpp-python==$(LLAMA)
	@$(BIN)/python -c 'import llama_cpp, sys; sys.exit(not llama_cpp.llama_supports_rpc())' 2>/dev/null || \
	  $(BIN)/python -m pip install --quiet --force-reinstall --no-deps '$(KEPT)'/llama_cpp_python-$(LLAMA)-*.whl
	@touch $@

# .made holds the folder it was made in: a checkout that was moved, or a Python that is gone, gets a new environment.
READY := $(shell [ "$$(cat $(VENV)/.made 2>/dev/null)" = "$(CURDIR)" ] && $(BIN)/python -c 'print("ready")' 2>/dev/null)
ifneq ($(READY),ready)
.PHONY: $(VENV)/.made
endif

$(VENV)/.made:
	@command -v $(PYTHON) >/dev/null || { echo "make: no $(PYTHON) here; install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: llmlab needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) -V 2>&1); name another: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "make: $(PYTHON) cannot make virtual environments; on Debian and Ubuntu: sudo apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@printf '%s' '$(CURDIR)' > $@
