#!/usr/bin/env bash
# Makes the virtual environment DIR with sglang-router.
#   tests/peers/sglang_router_env.sh DIR
set -euo pipefail
[[ $# -eq 1 ]] || { echo "usage: $0 DIR" >&2; exit 2; }
directory=$(realpath -m "$1")
cd "$(dirname "$0")/../.."
[[ -x .venv/bin/uv ]] || { echo "$0: run 'make setup' first: this takes uv and Python from .venv" >&2; exit 1; }

scripts/uv.sh venv --quiet --allow-existing --python .venv/bin/python "$directory"
scripts/uv.sh pip install --python "$directory/bin/python" 'sglang-router==0.3.2'
