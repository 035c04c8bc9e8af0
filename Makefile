# Needs Python >= 3.11 (with venv), a C++ compiler and make: every target makes .venv and installs what it needs.
#
#   make install    .venv with jasper_fast, editable, and its native libraries
#   make demo       train on synthetic speech, transcribe new synthetic voices, compare the fused engine with eager
#   make test       all tests
#   make test-fast  all but the slow ones, under three minutes
#   make compile    compile every Triton kernel for sm_80 to sm_100 with two versions of Triton, and the CUDA convs and
#                   NovoGrad for sm_75 to sm_120, and compare the results with the committed tables
#   make bench      measure kernels, training, latency and memory, ours and eager PyTorch's, in under ten minutes
#   make mutants    put 92 mistakes into the CUDA convs and NovoGrad, one at a time; a test must find each. Ten minutes
#   make sanitize   tests of the ops under AddressSanitizer, UBSan and ThreadSanitizer
#   make wheelhouse download wheels for a machine that has PyTorch but no network, into build/wheelhouse (WHEELS=3.12:
#                   the machine's Python)
#   make lint       ruff
#   make clean      remove build products; make distclean removes .venv too
#
#   GATE=--quick            options of make compile: `python -m bench compile --help`
#   PYTHON=python3.12       the Python that makes .venv
#   TORCH=2.13.0            the torch that is installed (one already in .venv is kept)
#   TORCH_INDEX_URL=URL     where torch comes from; https://download.pytorch.org/whl/cpu has a smaller build without CUDA

PYTHON ?= python3
TORCH ?= 2.13.0
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install --quiet
PINS := $(VENV)/constraints.txt
OLDER := $(CURDIR)/build/triton-3.6.0
NATIVE := $(shell find csrc -type f -not -name '*.pyc')

.PHONY: install demo test test-fast compile bench mutants sanitize wheelhouse lint clean distclean help
.DEFAULT_GOAL := help

help:
	@sed -n '/^[^#]/q; /^$$/q; s/^# \{0,1\}//p' Makefile

install: $(VENV)/.built

$(PY):
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python >= 3.11, or set PYTHON="; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than 3.11: set PYTHON="; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch is installed first, by itself, so that no later package replaces the chosen build. The pins of Triton,
# setuptools and numpy in constraints.txt are used only with the torch that is pinned there. Other versions of torch need
# other versions of Triton and setuptools, and the interpreter of Triton 3.6 needs numpy before 2.4.
$(VENV)/.installed: pyproject.toml setup.py constraints.txt | $(PY)
	@$(PY) -c 'import torch' 2>/dev/null || { echo "installing torch $(TORCH) and the rest, a few minutes"; \
	  $(PIP) $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)) "torch==$(TORCH)"; }
	@$(PY) -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $(PINS)
	@if grep -q "^$$(grep '^torch==' constraints.txt)" $(PINS); then grep -v '^torch==' constraints.txt; \
	  else grep -vE '^(torch|triton|setuptools|numpy)==' constraints.txt; echo 'numpy<2.4'; echo 'setuptools<82'; fi >> $(PINS)
	$(PIP) -c $(PINS) 'setuptools>=77' wheel ninja
	$(PIP) -c $(PINS) --no-build-isolation -e '.[dev]'
	@touch $@

$(VENV)/.built: $(VENV)/.installed $(NATIVE)
	$(PY) csrc/build.py
	@$(PY) -c 'from jasper_fast.kernels import native; [print(f"{k}: {v or str()}") for k, v in native.explain().items() if v]'
	@touch $@

demo: install
	$(PY) -m jasper_fast.demo

test: install
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto --maxprocesses 8 tests

test-fast: install
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto --maxprocesses 8 -m "not slow" tests

# Versions of Triton generate different code. The older version is installed into its own folder, which `make compile`
# then puts first on the path.
$(OLDER)/.installed: | $(VENV)/.installed
	rm -rf $(OLDER)
	$(PIP) --no-deps --target $(OLDER) triton==3.6.0
	@touch $@

compile: install $(OLDER)/.installed
	@failed=0; $(PY) -m bench compile $(GATE) || failed=1; \
	  PYTHONPATH=$(OLDER) $(PY) -m bench compile $(GATE) || failed=1; \
	  if command -v nvcc >/dev/null || [ -n "$$CUDA_HOME" ]; then $(PY) -m bench compile --cuda $(GATE) || failed=1; \
	  else echo "no nvcc: the CUDA kernels are not compiled"; fi; exit $$failed

bench: install
	$(PY) -m bench all

mutants: install
	JASPER_FAST_MUTANTS=all OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto --maxprocesses 8 tests/test_conv1d_cuda_mutants.py tests/test_novograd.py

sanitize: install
	$(PY) tests/fuzz/sanitize.py

# A GPU machine keeps the torch, Triton and numpy that it has. To install the other packages there, run
# pip install --no-index --find-links build/wheelhouse PACKAGES, or call 1 of `python -m jasper_fast.bench.gpu.day`.
WHEELS ?= 3.12
wheelhouse: | $(PY)
	@mkdir -p build/wheelhouse
	@grep -vE '^(#|torch==|triton==|numpy==|setuptools==|wheel==)' constraints.txt | while read -r pin; do \
	  $(PY) -m pip --disable-pip-version-check download --quiet --no-deps --only-binary :all: --implementation cp \
	    --python-version $(WHEELS) --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
	    --platform manylinux2014_x86_64 --dest build/wheelhouse "$$pin" 2>/dev/null \
	    || echo "no wheel of $$pin for Python $(WHEELS): left out"; done
	@echo "$$(ls build/wheelhouse/*.whl | wc -l) wheels for Python $(WHEELS) in build/wheelhouse"

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

clean:
	rm -rf build dist *.egg-info jasper_fast/lib .pytest_cache .ruff_cache .benchmarks $(VENV)/.built

distclean: clean
	rm -rf $(VENV)
