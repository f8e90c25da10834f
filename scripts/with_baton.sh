#!/usr/bin/env bash
# with_baton.sh CONFIG COMMAND...: run COMMAND while CONFIG is served here; exits as COMMAND does.
set -euo pipefail
config=${1:?usage: with_baton.sh CONFIG COMMAND...}
shift
log=$(mktemp)
.venv/bin/baton run "$config" --no-dashboard >"$log" 2>&1 &
server=$!
trap 'kill -INT "$server" 2>/dev/null || true; wait "$server" || true; rm -f "$log"' EXIT
until grep -q "Baton serves" "$log"; do
    kill -0 "$server" 2>/dev/null || { cat "$log" >&2; exit 1; }
    sleep 1
done
"$@"
