# Sourced by the scripts that make a peer's environment, with their arguments: makes the empty virtual environment DIR.
[[ $# -eq 1 ]] || { echo "usage: $0 DIR" >&2; exit 2; }
directory=$(realpath -m "$1")
cd "$(dirname "$0")/../.."
[[ -x .venv/bin/uv ]] || { echo "$0: run 'make setup' first: this takes uv and Python from .venv" >&2; exit 1; }
scripts/uv.sh venv --quiet --allow-existing --python .venv/bin/python "$directory"
