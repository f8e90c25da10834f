#!/usr/bin/env bash
# Runs .venv's uv with the indexes that pip is configured with: uv does not read pip's configuration.
set -euo pipefail
venv="$(dirname "$0")/../.venv"

# pip_setting NAME: what pip would use for it (the environment comes before its configuration files), or nothing.
pip_setting() {
    local variable="PIP_${1^^}"
    echo "${!variable:-$("$venv/bin/python" -m pip config get "global.${1//_/-}" 2>/dev/null || true)}"
}

# join SEPARATOR WORD...
join() { local IFS="$1"; shift; echo "$*"; }

# shellcheck disable=SC2046,SC2086  # pip separates several values by white space: split them
{
    index=$(pip_setting index_url)
    extra=$(join ' ' ${UV_EXTRA_INDEX_URL:-} $(pip_setting extra_index_url))
    links=$(join ',' ${UV_FIND_LINKS:-} $(pip_setting find_links))
}
cert=$(pip_setting cert)
[[ -n "$index" ]] && export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$index}"
[[ -n "$extra" ]] && export UV_EXTRA_INDEX_URL="$extra"
[[ -n "$links" ]] && export UV_FIND_LINKS="$links"
[[ -n "$cert" ]] && export SSL_CERT_FILE="${SSL_CERT_FILE:-$cert}"
# As pip does: the best version over all indexes. uv would take what the first index with that name holds.
export UV_INDEX_STRATEGY="${UV_INDEX_STRATEGY:-unsafe-best-match}"

exec "$venv/bin/uv" "$@"
