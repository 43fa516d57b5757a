# Each target makes .venv and installs what it needs by itself.
VENV ?= .venv
PYTHON ?= python3
PY = $(VENV)/bin/python
PIP = $(PY) -m pip install -q --disable-pip-version-check

.PHONY: demo test lint bench clean

# torch comes first and alone: a machine that has only the CPU build must not be handed the CUDA one by
# another package's requirement.
$(VENV)/.ok: pyproject.toml constraints.txt
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "installing torch, then the rest, into $(VENV) (once)"
	@$(PIP) -c constraints.txt torch 2>&1 | grep -v "is ignored" || true
	@$(PY) -c "import torch"
	@$(PIP) -c constraints.txt -e ".[dicom,sam,dev]" 2>&1 | grep -v "is ignored" || true
	@$(PY) -c "import autosam3d, pydicom, transformers, pytest"
	@touch $@

demo: $(VENV)/.ok
	OMP_NUM_THREADS=2 $(PY) -m autosam3d demo demo

test: $(VENV)/.ok
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist worksteal

lint: $(VENV)/.ok
	$(PY) -m ruff check src tests benchmarks examples
	$(PY) -m pyright
	$(VENV)/bin/lint-imports

bench: $(VENV)/.ok
	for script in benchmarks/bench_*.py; do $(PY) $$script || exit 1; done

clean:
	rm -rf $(VENV) demo build dist
