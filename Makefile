# Every target prepares .venv itself (scripts/setup_env.py); once it is up to date no pip runs and no network is needed.
# Variables: PYTHON (interpreter the environment is made with), TORCH_INDEX, TORCH_ALLOW_CUDA (see the script);
# WORKERS (processes that share the tests; auto: one per core); BASE (a commit: `make bench` compares with it instead);
# PEERS (the libraries that `make bench` makes environments for; empty: without them); GPU_PYTHON (for `make gpu` where torch for the GPU is
# installed already: nothing is downloaded, the project is installed beside it, editable and without the extension).
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
WORKERS ?= auto
PEERS ?= adapters litgpt
export TORCH_INDEX TORCH_ALLOW_CUDA

SETUP = $(PYTHON) scripts/setup_env.py --venv $(VENV)
BIN = $(VENV)/bin
CSRC = $(wildcard csrc/*.cpp csrc/*.h csrc/*.hpp)

.PHONY: help setup setup-demo setup-bench demo test check format bench gpu audit clean

help:
	@echo "make demo     fine-tune LLaMA-Adapter on movie reviews with a real model, then use it"
	@echo "make test     run the tests            (ARGS='-k name' is passed to pytest)"
	@echo "make check    lint, formatting, types  (changes nothing)"
	@echo "make format   rewrite the sources in the project's format"
	@echo "make bench    benchmarks on this machine's CPU against peers, then tables and pictures (BASE=<commit>: two versions)"
	@echo "make gpu      GPU correctness, then timings against peers (ARGS='--part 1', then 2: six minutes each; docs/gpu.md)"
	@echo "make audit    what the GPU kernels compile to, without a GPU"
	@echo "make clean    remove .venv, build outputs and caches"

setup:
	@$(SETUP)

# Neither Triton nor what only developers need: that is half of the download.
setup-demo:
	@$(SETUP) --extras hf

setup-bench:
	@$(SETUP) --extras triton,hf,compare,dev,bench

demo: setup-demo
	$(BIN)/fastadapter demo $(ARGS)

test: setup
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --maxprocesses 8 --dist worksteal $(ARGS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(if $(CSRC),$(BIN)/clang-format --dry-run --Werror $(CSRC))
	$(BIN)/mypy
	$(BIN)/python scripts/check_tree.py

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(if $(CSRC),$(BIN)/clang-format -i $(CSRC))

ifdef BASE
bench: setup-bench
	$(BIN)/python -m benchmarks.versions $(BASE) $(ARGS)
else
bench: setup-bench
	$(if $(strip $(PEERS)),$(BIN)/python scripts/peer_environments.py --only $(PEERS))
	$(BIN)/python -m benchmarks.run --report $(ARGS)
endif

ifdef GPU_PYTHON
gpu:
	FASTADAPTER_BUILD=0 $(GPU_PYTHON) -m pip install -q --no-deps --no-build-isolation --no-index -e .
	$(GPU_PYTHON) -m benchmarks.gpu $(ARGS)
else
gpu: setup-bench
	$(BIN)/python -m benchmarks.gpu $(ARGS)
endif

audit: setup
	$(BIN)/python -m benchmarks.audit $(ARGS)

clean:
	rm -rf $(VENV) .venv-peers build dist .pytest_cache .ruff_cache .mypy_cache .benchmarks .hypothesis
	rm -rf fastadapter.egg-info fastadapter/_build_info.json fastadapter/*.so
	find fastadapter kernels tests benchmarks scripts -name __pycache__ -type d -prune -exec rm -rf {} +
