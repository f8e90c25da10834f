#!/usr/bin/env bash
# Makes the virtual environment DIR with NVIDIA Dynamo's frontend, router and mocker.
#   benchmarks/peers/dynamo_env.sh DIR
set -euo pipefail
. "$(dirname "$0")/venv.sh" # makes it, at $directory

overrides=$(mktemp)
trap 'rm -f "$overrides"' EXIT
# aisimulate is a stub that fetches its wheel from NVIDIA's own index when it is installed; only the mocker's optional
# performance model and the planner import it. And 1.6.1 wants a newer certifi than some indexes have.
printf '%s\n' 'aisimulate ; sys_platform == "never"' 'certifi>=2026' >"$overrides"

scripts/uv.sh pip install --python "$directory/bin/python" --override "$overrides" \
    'ai-dynamo==1.6.1' 'ai-dynamo-runtime==1.6.1' 'transformers==5.23.0'
