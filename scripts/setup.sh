#!/usr/bin/env bash
# Makes an environment with Baton and one engine in it, for CUDA where there is an NVIDIA GPU, else for the CPU:
#   setup.sh           .venv: vLLM, the frontend, the command line, the tests' tools
#   setup.sh sglang    .venv-sglang, by .venv's Python: what the replicas of pools with `engine: sglang` run in
# Settings: PYTHON (default python3), BATON_BUILD (cuda or cpu: decides instead of the look for a GPU).
# A second run does nothing until a lock, pyproject.toml, a stand-in or the choice of build changes.
set -euo pipefail
cd "$(dirname "$0")/.."
uv=scripts/uv.sh
export UV_COMPILE_BYTECODE=1 # an engine is three processes, each of which imports some 5,000 modules

die() { echo "setup: $*" >&2; exit 1; }

has_nvidia_gpu() {
    [[ -e /proc/driver/nvidia/version ]] || nvidia-smi -L >/dev/null 2>&1
}

make_vllm_venv() {
    local base="${PYTHON:-python3}"
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || die "$base is not Python 3.11 or newer; set PYTHON"
    "$base" -m venv .venv
}

make_sglang_venv() {
    .venv/bin/python -m venv --clear --without-pip .venv-sglang
}

require_cpu_torch() {
    local torch
    torch=$(grep '^torch==' "$lock")
    "$uv" pip install --quiet --dry-run --no-deps --python "$python" "$torch" || die \
        "$torch cannot be had (see above). Add the PyTorch CPU wheel index (its address: pytorch.org/get-started, Compute Platform" \
        "CPU) to UV_EXTRA_INDEX_URL, or a folder with that wheel to UV_FIND_LINKS, and run this again."
}

install_cpu() {
    require_cpu_torch
    # The lock is complete, and the engines' metadata asks for packages that it leaves out on purpose: hence --no-deps.
    "$uv" pip install --python "$python" --no-deps --requirement "$lock"
    "$uv" pip install --python "$python" --no-deps --editable .
    if [[ -n "$standins" ]]; then "$uv" pip install --python "$python" --no-deps --reinstall "./$standins"; fi
}

install_cuda() {
    # First, as one of them has the name of a package of the CUDA build.
    if [[ -n "$standins" ]]; then "$uv" pip uninstall --quiet --python "$python" baton-sglang-cpu; fi
    "$uv" pip install --python "$python" --editable ".[$extras]"
}

engine="${1:-vllm}"
case "$engine" in
    vllm) venv=.venv lock=requirements.lock extras=vllm,dev standins="" ;;
    sglang) venv=.venv-sglang lock=requirements-sglang.lock extras=sglang standins=standins/sglang_cpu ;;
    *) die "there is no environment for '$engine'; known are vllm and sglang" ;;
esac
python=$venv/bin/python
stamp=$venv/.baton-setup
[[ "$engine" == vllm ]] || bash scripts/setup.sh

if [[ -z "${BATON_BUILD:-}" ]]; then
    BATON_BUILD=cpu
    if has_nvidia_gpu; then BATON_BUILD=cuda; fi
fi
sources=("$lock" pyproject.toml scripts/setup.sh ${standins:+"$standins"})
wanted="$BATON_BUILD $(find "${sources[@]}" -type f -not -name '*.pyc' | sort | xargs cat | sha256sum)"
# The second environment is right only with the Python of the first: objects are pickled between the two.
if [[ "$python" -ef .venv/bin/python && -e "$stamp" && "$(<"$stamp")" == "$wanted" ]]; then exit 0; fi

[[ "$python" -ef .venv/bin/python ]] || "make_${engine}_venv"
rm -f "$stamp"
[[ -x .venv/bin/uv ]] || .venv/bin/python -m pip install -qq "$(grep '^uv==' requirements.lock)"
case "$BATON_BUILD" in
    cuda) echo "setup: $venv: $engine for CUDA, as there is an NVIDIA GPU or BATON_BUILD says so"; install_cuda ;;
    cpu) echo "setup: $venv: $engine for the CPU, from $lock"; install_cpu ;;
    *) die "BATON_BUILD is '$BATON_BUILD'; known are cuda and cpu" ;;
esac
echo "$wanted" >"$stamp"
