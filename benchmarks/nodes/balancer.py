"""A load balancer before the nodes' HAProxies, as clients outside of a cluster have one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

CONFIGURATION = """global
    maxconn 2000
defaults
    mode http
    timeout connect 2s
    timeout client 300s
    timeout server 300s
    timeout check 2s
    option redispatch 1
    retries 2
frontend clients
    bind unix@{socket}
    default_backend nodes
backend nodes
    option httpchk GET /-/healthz
    http-check expect status 200
    default-server check inter 1s fall 3 rise 2 on-marked-down shutdown-sessions
{servers}"""
"""It asks each node's health once a second, and after three failures ends the connections there, as AWS's network load
balancers do by default (they ask every 10 s)."""


def configuration(socket: Path, servers: Sequence[str]) -> str:
    """Return HAProxy's configuration: it listens on the Unix socket `socket`, and the servers are HOST:PORT."""
    lines = (f"    server node{number} {server}\n" for number, server in enumerate(servers))
    return CONFIGURATION.format(socket=socket, servers="".join(lines))
