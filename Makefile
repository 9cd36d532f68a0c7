# Everything installs into $(VENV); a fresh clone needs python3 with venv, and a C++20 compiler.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2

BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
BUILD_INPUTS := setup.py pyproject.toml $(shell find csrc -type f)

# Two test processes share the cores: threads that spin while they wait would starve the other.
TEST_ENV := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
PYTEST := $(TEST_ENV) $(BIN)/pytest -n $(WORKERS)

STABLE_ABI := -DTORCH_TARGET_VERSION=0x020b000000000000
CXX_SOURCES = $(shell find csrc tests/cpp tests/emulation -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
TORCH_INCLUDES = $(shell $(BIN)/python -c \
	"from torch.utils.cpp_extension import include_paths as p; print(*('-isystem' + i for i in p()))")

.PHONY: help demo test test-all sanitize lint format bench clean
.DELETE_ON_ERROR:

help:  ## say what there is to make
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(STAMPS)/build  ## classify photographs with and without cvfast; pictures in demo_output/
	$(BIN)/cvfast demo

test: lint  ## lint, then the tests
	$(PYTEST)

test-all: lint  ## lint, then all tests: also the slow ones
	$(PYTEST) -m ''

sanitize:  ## the CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer
	$(MAKE) -C tests/cpp KIND=sanitize

lint: $(STAMPS)/test $(STAMPS)/build  ## formatting, types, and the C++ against the stable ABI
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)
	$(CXX) -fsyntax-only -std=c++20 -Wall -Wextra -Werror $(STABLE_ABI) -Icsrc $(TORCH_INCLUDES) \
		csrc/cpu/*bindings.cpp

format: $(STAMPS)/test  ## rewrite the sources as lint wants them
	$(BIN)/ruff check --fix --select I .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

bench: $(STAMPS)/test $(STAMPS)/build  ## time the zoo against its peers; hours
	$(BIN)/python benchmarks/bench_depthwise.py --json benchmarks/results/cpu/depthwise.json
	$(BIN)/python benchmarks/bench_pointwise.py --json benchmarks/results/cpu/pointwise.json
	$(BIN)/python benchmarks/bench_conv.py --json benchmarks/results/cpu/conv.json
	$(BIN)/python benchmarks/bench_zoo.py
	$(BIN)/cvfast bench --batch 1,8 --threads 1,2 --dtype float32,bfloat16 --memory \
		--json benchmarks/results/cpu/networks.json
	$(BIN)/python benchmarks/limits.py
	$(BIN)/python benchmarks/tables.py

clean:  ## remove what was built, installed and drawn
	rm -rf $(VENV) build dist demo_output *.egg-info cvfast/_C_*.so
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMPS)/venv:
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/demo: $(STAMPS)/venv requirements/demo.txt
	$(PIP) install -r requirements/demo.txt
	@touch $@

$(STAMPS)/test: $(STAMPS)/demo requirements/test.txt requirements/no-deps.txt
	$(PIP) install -r requirements/test.txt
	$(PIP) install --no-deps -r requirements/no-deps.txt
	@touch $@

$(STAMPS)/build: $(STAMPS)/demo $(BUILD_INPUTS)
	PATH="$(abspath $(BIN)):$$PATH" $(PIP) install --no-build-isolation --no-deps -e .
	@touch $@
