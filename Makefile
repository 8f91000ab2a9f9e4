# SPDX-License-Identifier: Apache-2.0
# Each target works from a fresh clone with Python 3.10+, pip, make and g++: .venv is made on first use.

PYTHON ?= python3
TORCH ?= torch==2.13.0
bin := .venv/bin
# Compiling uses what is in .venv (no build isolation): fast, incremental, and with the torch that will run it.
export PATH := $(CURDIR)/$(bin):$(PATH)
sources := $(shell find csrc tools -name '*.[ch]pp' -o -name '*.h' -o -name '*.map' -o -name '*.py') CMakeLists.txt pyproject.toml
cpp := $(shell find csrc benchmarks -name '*.cpp' -o -name '*.h')

.PHONY: help demo ctest test test_emulated build bench fmt check docs mutate sanitize clean

help:  ## this list
	@sed -n 's/^\([a-z_]*\):.*## /  make \1\t/p' Makefile

.venv/torch.stamp:
	$(PYTHON) -m venv .venv
	$(bin)/python -m pip install --quiet $(TORCH)
	$(bin)/python -m pip install --quiet cmake ninja "scikit-build-core>=0.10" "pybind11>=3.0.2,<4"
	touch $@

.venv/build.stamp: .venv/torch.stamp $(sources)
	$(bin)/python -m pip install --quiet --no-build-isolation --editable ".[test]"
	touch $@

build: .venv/build.stamp  ## compile and install the package into .venv

demo: build  ## quantize a sentence encoder and a digit classifier; print speed, size and error
	$(bin)/octavo demo

ctest: .venv/torch.stamp
	$(bin)/cmake -S . -B build/ctest -G Ninja -DOCTAVO_BUILD_TESTS_ONLY=ON
	$(bin)/cmake --build build/ctest
	$(bin)/ctest --test-dir build/ctest --output-on-failure

test: build ctest  ## the programs in csrc/tests, then pytest
	$(bin)/python -m pytest

sanitize: .venv/torch.stamp  ## the programs in csrc/tests with AddressSanitizer and UBSan
	$(bin)/cmake -S . -B build/sanitize -G Ninja -DOCTAVO_BUILD_TESTS_ONLY=ON -DOCTAVO_SANITIZE=ON
	$(bin)/cmake --build build/sanitize
	$(bin)/ctest --test-dir build/sanitize --output-on-failure

# A CPU with AVX2 but neither AVX512 nor VNNI, and one without AVX. Not part of `test`: it needs Debian's qemu-user.
test_emulated: build ctest  ## the C++ programs and the behaviour tests on emulated older CPUs
	for cpu in Haswell Nehalem; do \
	  export OCTAVO_TEST_EMULATED=1; emulator="qemu-x86_64 -cpu $$cpu"; \
	  for program in test_kernels test_epilogue test_linear test_float_ops; do $$emulator build/ctest/csrc/tests/$$program || exit 1; done; \
	  $$emulator $(bin)/python -m pytest tests/test_behaviour.py || exit 1; \
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
