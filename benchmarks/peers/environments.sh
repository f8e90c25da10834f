#!/usr/bin/env bash
# Makes each peer's own environment in a folder of DIR; what a script says is in DIR/NAME.log.
#   benchmarks/peers/environments.sh DIR     then     python -m benchmarks.peers --environments DIR
# One that cannot be made is no error: the benchmark says why that peer has no numbers.
set -euo pipefail
[[ $# -eq 1 ]] || { echo "usage: $0 DIR" >&2; exit 2; }
mkdir -p "$1"
for peer in ray-llm dynamo sglang-router vllm-rs; do
    bash "$(dirname "$0")/${peer//-/_}_env.sh" "$1/$peer" >"$1/$peer.log" 2>&1 ||
        echo "$peer: $(tail -n 1 "$1/$peer.log")" >&2
done
