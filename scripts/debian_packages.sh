#!/usr/bin/env bash
# Installs what tests need of Debian, where it is missing; no service is installed, let alone started:
#   iproute2, util-linux   tests/cluster and benchmarks/nodes: nodes in namespaces
#   kubernetes-client      tests/cluster: kubectl, of Debian 13 or newer (12 has one without today's kustomize)
#   redis-tools            tests/cluster: where a Ray head keeps its state.  The server is in it under another name; the
#                          package redis-server adds a link to that, and a service, which nobody here wants.
set -euo pipefail

die() { echo "debian_packages: $*" >&2; exit 1; }

packages=()
add() { command -v "$1" >/dev/null || packages+=("$2"); }
add ip iproute2
add nsenter util-linux
add kubectl kubernetes-client
add redis-server redis-tools
[[ ${#packages[@]} -gt 0 ]] || exit 0

command -v apt-get >/dev/null || die "missing and not to be had by apt-get: ${packages[*]}: install them as this system does"
[[ $EUID -eq 0 ]] || die "missing, and only root can install them: ${packages[*]}: run sudo bash scripts/debian_packages.sh"
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${packages[@]}" >/dev/null
command -v redis-server >/dev/null || ln -s "$(command -v redis-check-rdb)" /usr/local/bin/redis-server
