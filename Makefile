# Each target makes .venv and installs what it needs by itself.
VENV ?= .venv
PYTHON ?= python3
PY = $(VENV)/bin/python
PIP = PIP_ROOT_USER_ACTION=ignore $(PY) -m pip install -q --disable-pip-version-check
TORCH_INDEX ?=
NEW_ENOUGH = "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=...')"

.PHONY: demo test lint bench clean

# torch comes first and alone: a machine that has only the CPU build must not be handed the CUDA one by
# another package's requirement. Where pip would take a CUDA build that is not wanted, name the index of PyTorch's
# CPU wheels: make demo TORCH_INDEX=URL
$(VENV)/.ok: pyproject.toml constraints.txt
	@test -x $(PY) || { $(PYTHON) -c $(NEW_ENOUGH) && $(PYTHON) -m venv $(VENV); }
	@echo "installing torch, then the rest, into $(VENV) (once)"
	@$(PIP) -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	@$(PIP) -c constraints.txt -e ".[dicom,sam,export,int8,dev]"
	@$(PY) -W ignore -c "import autosam3d, torch, pydicom, transformers, onnxruntime, openvino, pytest"
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
