# How to work on flashinfer_lite. `make` alone prints this list.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PROMPT ?=
ARGS   ?=
CUDA   :=

# One thread per worker: two workers use two cores, and sums are split alike on every machine.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2

NATIVE = $(shell find csrc -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu' -o -name '*.inc')

.DEFAULT_GOAL := help
.PHONY: help venv build simt test test-all test-gpu support mutants sanitize ptxas sass static demo fdpp bench lint format
.PHONY: asan wheel wheel-check clean

help:  ## print this list
	@awk -F ':.*## ' '/^[a-z-]*:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv:  # create or update .venv; returns at once when its inputs have not changed
	@command -v $(PYTHON) >/dev/null || { echo "flashinfer_lite: $(PYTHON) not found: sudo apt install python3 python3-venv python3-dev"; exit 1; }
	@$(PYTHON) scripts/bootstrap.py $(VENV)

# CUDA=0 and CUDA=1 are FLASHINFER_LITE_CUDA (setup.py); CUDA=pip is 1 with an nvcc that pip installs.
PIP_NVCC := $(filter pip,$(CUDA))
CUDA_ENV := $(if $(CUDA),FLASHINFER_LITE_CUDA=$(CUDA:pip=1)) $(if $(PIP_NVCC),CUDA_HOME= CUDA_PATH=)
build: venv  ## create .venv, compile what changed; CUDA=1: the CUDA half too, CUDA=pip: by pip's nvcc
	@$(if $(PIP_NVCC),$(PYTHON) scripts/bootstrap.py $(VENV) --also cuda)
	@$(CUDA_ENV) $(BIN)/python setup.py --quiet build_ext --inplace
	@$(PYTHON) scripts/bootstrap.py $(VENV) --editable

simt: venv  ## build the executor, which runs the CUDA kernels on the CPU, for the tests
	@$(BIN)/python scripts/build_simt.py --ops

test: build simt  ## build, then the tests; ARGS="-k decode" narrows
	$(PYTEST) -m "not slow" $(ARGS)

test-all: build simt  ## build, then every test, the long grids too
	$(PYTEST) $(ARGS)

test-gpu: build simt  ## the tests and the kernels' golden values, on a machine with a GPU
	$(BIN)/python scripts/test_gpu.py $(ARGS)

support:  ## write the README's support table; RECORD=1 runs all tests first for what it claims
	$(if $(RECORD),$(MAKE) test ARGS="--record-support docs/support.json")
	python3 scripts/support_table.py

mutants: build simt  ## break each barrier, wait and guard of the kernels; the tests must notice
	$(BIN)/python tests/mutants.py $(ARGS)

ptxas: venv  ## registers, shared memory and spills of each CUDA kernel, from the last CUDA build
	@$(BIN)/python scripts/kernel_report.py ptxas

sass: venv  ## machine instructions of each CUDA kernel, from the last CUDA build
	@$(PYTHON) scripts/bootstrap.py $(VENV) --also sass
	@$(BIN)/python scripts/kernel_report.py sass

static: venv  ## write docs/kernels/static.md: both of the above, with occupancy
	@$(PYTHON) scripts/bootstrap.py $(VENV) --also sass
	@$(BIN)/python scripts/kernel_report.py static

demo: build  ## generate text with a real model through our kernels; PROMPT="..." is yours
	@$(BIN)/python examples/demo.py $(if $(PROMPT),--prompt="$$PROMPT") $(ARGS)

fdpp: build  ## FlashDecoding++ on a real model: calibrate, tune, prove, time against torch
	@$(BIN)/python examples/flashdecoding_pp.py $(ARGS)

bench: build  ## time ours against torch; ARGS="--help" shows the options
	$(BIN)/python bench/bench.py $(ARGS)

lint: venv  ## formatting, ruff and the layer rule; changes nothing, needs no build
	$(BIN)/clang-format --dry-run -Werror $(NATIVE)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pytest -q --noconftest tests/test_layers.py

format: venv  ## put every file into the house format
	$(BIN)/clang-format -i $(NATIVE)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The package is copied beside its instrumented library, so the ordinary build stays as it is. The
# runtime is preloaded because python itself is not instrumented; python's own leaks are not ours;
# --capture=sys lets the report of a dying process reach the terminal.
ASAN := build/asan
asan: venv  ## the hostile calls under AddressSanitizer and UBSan
	FLASHINFER_LITE_SANITIZE=address,undefined $(BIN)/python setup.py --quiet build --build-lib $(ASAN)
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 \
	PYTHONPATH=$(ASAN) OMP_NUM_THREADS=2 $(BIN)/pytest -q --capture=sys tests/test_hostile*.py $(ARGS)

sanitize: build  ## the GPU tests under compute-sanitizer: memcheck, racecheck, synccheck
	$(BIN)/python scripts/test_gpu.py --stage sanitizer $(ARGS)

wheel-check: venv  ## build the wheel, try it with each Python and torch that can be had here
	$(BIN)/python scripts/check_wheel.py $(ARGS)

wheel: venv  ## one wheel for every Python >= 3.10, in dist/
	$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .
	@ls dist/*.whl

clean:  ## remove what was built; .venv stays
	rm -rf build dist *.egg-info compile_commands.json flashinfer_lite/*.so
