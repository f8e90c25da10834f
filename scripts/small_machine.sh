#!/usr/bin/env bash
# small_machine.sh COMMAND...: run COMMAND where Ray's files have DISK (512m) and all processes together MEMORY (6G).
# Nothing else on this machine notices: the small disk is in memory, in a mount namespace of its own.  Needs root, and
# cgroups of version 1 for the memory.
set -euo pipefail
[ $# -gt 0 ] || { echo "usage: small_machine.sh COMMAND..." >&2; exit 2; }
RAY_TMPDIR=$(mktemp -d /tmp/small-XXXX)
cgroup=/sys/fs/cgroup/memory/baton-$$
export RAY_TMPDIR cgroup
trap 'rmdir "$RAY_TMPDIR" "$cgroup" 2>/dev/null || true' EXIT
mkdir "$cgroup"
echo "${MEMORY:-6G}" >"$cgroup/memory.limit_in_bytes"
# shellcheck disable=SC2016
unshare --mount bash -euc '
    echo $$ >"$cgroup/cgroup.procs"
    mount -t tmpfs -o "size=${DISK:-512m}" tmpfs "$RAY_TMPDIR"
    mount --bind "$cgroup" /sys/fs/cgroup/memory # Ray looks at this path, whatever cgroup it is in
    exec "$@"' small_machine "$@"
