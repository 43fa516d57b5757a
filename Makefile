# Each target makes .venv and installs what it needs by itself.
VENV ?= .venv
PYTHON ?= python3
PY = $(VENV)/bin/python
PIP = PIP_ROOT_USER_ACTION=ignore $(PY) -m pip install -q --disable-pip-version-check
TORCH_INDEX ?=
NEW_ENOUGH = "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=...')"

.PHONY: demo test soak test-mobile lint bench web clean

# torch comes first and alone: a machine that has only the CPU build must not be handed the CUDA one by
# another package's requirement. Where pip would take a CUDA build that is not wanted, name the index of PyTorch's
# CPU wheels: make demo TORCH_INDEX=URL
$(VENV)/.ok: pyproject.toml constraints.txt
	@test -x $(PY) || { $(PYTHON) -c $(NEW_ENOUGH) && $(PYTHON) -m venv $(VENV); }
	@echo "installing torch, then the rest, into $(VENV) (once)"
	@$(PIP) -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	@$(PIP) -c constraints.txt -e ".[dicom,pacs,sam,export,int8,serve,dev]"
	@$(PY) -W ignore -c "import autosam3d, torch, pydicom, highdicom, transformers, onnxruntime, openvino, fastapi, uvicorn, requests, pytest"
	@touch $@

demo: $(VENV)/.ok
	OMP_NUM_THREADS=2 $(PY) -m autosam3d demo demo

test: $(VENV)/.ok
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist worksteal

# Long forms: tests/soak, and the tests elsewhere that are marked; SHARE=0.1 does a tenth of the counts. Those that
# measure time come last and alone. All are run, also where one fails; benchmarks/results/soak.md says what they did.
SHARE ?= 1
SOAK = OMP_NUM_THREADS=1 AUTOSAM3D_SOAK_TABLE=benchmarks/results/soak.md AUTOSAM3D_SOAK_SHARE=$(SHARE) \
	$(PY) -m pytest -q --timeout=1800
soak: $(VENV)/.ok
	@failed=0; \
	$(SOAK) -n 2 -m soak tests || failed=1; \
	$(SOAK) -n 2 --dist worksteal -m "not alone" tests/soak || failed=1; \
	$(SOAK) -m alone tests/soak || failed=1; \
	exit $$failed

# The converters for phones want other versions of a few packages: an environment of their own on top of the first.
$(VENV)-mobile/.ok: $(VENV)/.ok constraints-mobile.txt
	@echo "installing LiteRT, ExecuTorch and CoreML into $(VENV)-mobile (once)"
	@$(PY) -m venv $(VENV)-mobile
	@$(VENV)-mobile/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > $(VENV)-mobile/.where
	@$(PY) -c "import sysconfig; print('import site; site.addsitedir(' + repr(sysconfig.get_path('purelib')) + ')')" \
		> "$$(cat $(VENV)-mobile/.where)/below.pth"
	@PIP_ROOT_USER_ACTION=ignore $(VENV)-mobile/bin/python -m pip install -q --disable-pip-version-check \
		-c constraints-mobile.txt litert-torch executorch coremltools
	@$(VENV)-mobile/bin/python -W ignore -c "import autosam3d, torch, litert_torch, executorch, coremltools" 2>/dev/null
	@touch $@

test-mobile: $(VENV)-mobile/.ok
	OMP_NUM_THREADS=1 $(VENV)-mobile/bin/python -m pytest -q -n 2 tests/export/test_mobile.py

lint: $(VENV)/.ok
	$(PY) -m ruff check src tests benchmarks examples web/test
	$(PY) -m pyright
	$(VENV)/bin/lint-imports

bench: $(VENV)/.ok
	for script in benchmarks/bench_*.py; do $(PY) $$script || exit 1; done

# The browser app: its tests, and the built page into src/autosam3d/web_app. Needs node 20 or newer.
web:
	cd web && npm ci --no-audit --no-fund && npm test && npm run build

clean:
	rm -rf $(VENV) $(VENV)-mobile demo build dist
