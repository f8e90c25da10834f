#!/usr/bin/env bash
# Makes the virtual environment DIR with sglang-router.
#   benchmarks/peers/sglang_router_env.sh DIR
set -euo pipefail
. "$(dirname "$0")/venv.sh" # makes it, at $directory

scripts/uv.sh pip install --python "$directory/bin/python" 'sglang-router==0.3.2'
