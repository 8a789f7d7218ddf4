# Everything runs in .venv, which is made on first use. PYTHON=python3.12 picks the interpreter.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
SLOW := .venv/.slow
SKY := .venv/sky
SKYPILOT := 'skypilot[gcp]==0.14.1'
MINIMUM := 3, 11

# Tests that compile nothing.
AT_ONCE := tests/common/analysis tests/common/evals tests/common/report tests/common/test_*.py \
	tests/common/data/objectives tests/common/data/sources tests/common/data/tokenizers tests/common/data/test_*ing.py \
	tests/experiments/cli/test_main.py tests/experiments/cli/test_command_lines.py tests/experiments/test_ranges.py

.PHONY: help demo test test-slow lint check bench

help:
	@echo "make demo       train both families, print a table, write report.html"
	@echo "make test       all tests but the slow ones, doctests included"
	@echo "make test-slow  the slow tests: several processes, kills, TPU's compiler, SkyPilot, Ray, PyTorch, Transformers (3 GB more)"
	@echo "make lint       ruff and mypy"
	@echo "make check      lint, and the tests that compile nothing: within a minute"
	@echo "make bench      speed, side by side with peers (PyTorch where it is installed)"

demo: $(INSTALLED)
	$(BIN)/twinstack run first_light

test: $(INSTALLED)
	$(BIN)/python -m pytest -q -m "not slow" --durations=10 --numprocesses auto --maxprocesses 8 --dist worksteal

test-slow: $(SLOW)
	PATH="$$PATH:$(CURDIR)/$(SKY)/bin" $(BIN)/python -m pytest -q -m slow --durations=10 || [ $$? -eq 5 ] # 5: there is none

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

check: lint
	$(BIN)/python -m pytest -q -m "not slow" --numprocesses auto --maxprocesses 8 --dist worksteal $(AT_ONCE)

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks

# The stamp is made last, so that a broken installation is begun anew.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < ($(MINIMUM)))' 2>/dev/null || { \
		echo "twinstack needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) --version 2>&1 | head -n 1);" \
			"name another: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }
	@echo "Making .venv and installing; this takes a minute or two and 1.5 GB."
	@if command -v uv >/dev/null; then \
		uv venv --clear --python $(PYTHON) .venv && \
		uv pip install --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'; \
	else \
		$(PYTHON) -m venv --clear .venv && \
		$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'; \
	fi
	@touch $@

# What slow tests need beside: PyTorch and Transformers to compare with, libtpu, TPU's compiler, Ray, and SkyPilot, which reads
# the jobs written for it and has an environment of its own, since its requirements do not go with constraints.txt. On
# Linux only PyTorch's CPU build will do (constraints.txt): the ordinary one brings gigabytes of CUDA. Tests of what is not
# there are skipped, and say so.
$(SLOW): $(INSTALLED)
	@echo "Installing libtpu, SkyPilot, Ray, PyTorch (CPU) and Transformers for the slow tests."
	@$(install_sky) || echo "SkyPilot is not to be had for this Python, so the jobs written for it are not shown to it." >&2
	@$(call install,plan) || echo "libtpu is not to be had for this machine, so tests with TPU's compiler will be skipped." >&2
	@$(call install,ray) || echo "Ray is not to be had for this machine, so studies on a Ray cluster are not tested." >&2
	@$(call install,parity) && touch $@ || \
		echo "No CPU build of PyTorch was found, so the parity tests will be skipped: name the index that PyTorch's" \
			"own installation page gives for CPU, make test-slow PIP_EXTRA_INDEX_URL=..." >&2

define install_sky
if [ -x $(BIN)/pip ]; then \
	$(BIN)/python -m venv --clear $(SKY) && \
	$(SKY)/bin/python -m pip install --disable-pip-version-check --quiet $(SKYPILOT); \
else \
	uv venv --quiet --clear --python $(BIN)/python $(SKY) && uv pip install --quiet --python $(SKY)/bin/python $(SKYPILOT); \
fi
endef

# An extra, beside `dev`.
define install
if [ -x $(BIN)/pip ]; then \
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[dev,$(1)]'; \
else \
	UV_FIND_LINKS="$${UV_FIND_LINKS:-$$PIP_FIND_LINKS}" UV_EXTRA_INDEX_URL="$${UV_EXTRA_INDEX_URL:-$$PIP_EXTRA_INDEX_URL}" \
		uv pip install --python $(BIN)/python --constraint constraints.txt --editable '.[dev,$(1)]'; \
fi
endef
