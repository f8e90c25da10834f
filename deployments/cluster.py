"""Starts a Ray cluster with Serve on this machine, or connects to one that runs.

RAY_ADDRESS names the cluster; without it, the cluster is on this machine.  Ray reads its flags when it is imported, so
this module imports it only after they are set.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from app.ports import free_port
from deployments import haproxy

RAY_FLAGS = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    # HTTP goes through HAProxy to the frontends, instead of through a Python proxy and a call for each chunk.
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",  # a Python process would read a line per request; /metrics has the same
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",  # 30 s are for load balancers outside the cluster
    # When frontends come or go, a new HAProxy takes over.  The old one has this long to end its streams; the default is
    # 120 s.
    "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "600",
    # How long a client may send nothing of a body that it has announced, or take nothing of its answer; the default is
    # an hour.  It may wait for an answer for longer.
    "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "300",
    # Replicas report their load (deployments/autoscaling.py); by default Serve also counts the calls of handles.
    "RAY_SERVE_COLLECT_AUTOSCALING_METRICS_ON_HANDLE": "0",
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.25",  # the default, ten loops a second, always takes 2 % of a core
    # A replica that fails its health checks is killed.  Asked to end in order, one that hangs would keep its GPU for
    # the whole of graceful_shutdown_timeout_s.
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
    # An HAProxy that has died is started again after three checks; the default of 10 s makes that half a minute.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2",
    # A connection to another machine that acknowledges nothing ends after 10 s, as the channel's do, and calls on it
    # fail instead of waiting; with the default of 120 s they still wait when the network has long been whole again.
    "RAY_grpc_client_keepalive_timeout_ms": "10000",
    # With fewer files than this, 1,000 by default, the monitor of log files looks for new ones ten times a second, else
    # twice, which saves 2 of the 3 ms that it takes of each.  `baton run --verbose` shows a new process's lines later.
    "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",
    "RAY_worker_niceness": "0",  # Ray's default is 15: on a busy machine serving would come last
    "RAY_raylet_start_wait_time_s": "120",  # 30 s are not enough on two busy cores
}
"""The environment of every Ray and Serve process.  Variables that the user has set take precedence."""

LOOPBACK = {
    # "0" has Ray take 127.0.0.1 for this node's address, so that its processes, Serve's, channels and side channels
    # listen there.  Ray means it for systems whose firewalls ask about each port.  Otherwise it takes the machine's own
    # address, also in place of a 127.0.0.1 that is given to it.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "UCX_NET_DEVICES": "lo",  # else NIXL's UCX listens on all; NVLink and shared memory are not among them
    "VLLM_HOST_IP": "127.0.0.1",
    "SGLANG_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
}
"""What keeps a cluster on the loopback interface.  One that is started here has no other machine to talk to."""

FIXED_PORTS = (
    "RAY_SERVE_HAPROXY_STATS_PORT",
    "RAY_SERVE_HAPROXY_METRICS_PORT",
    # HAProxy sends requests there while an application that is deployed again is being built.  The proxies of several
    # clusters on one machine all listen on the default port, and another one's answers 404.
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT",
    "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT",
)
"""Variables with ports that are the same for every cluster unless they are set."""


def runs_here() -> bool:
    """Whether Ray is started on this machine.  If RAY_ADDRESS is set, it names a cluster that already runs."""
    return "RAY_ADDRESS" not in os.environ


def ray_environment() -> dict[str, str]:
    """Return RAY_FLAGS, the path of Baton's HAProxy, and free ports for what would otherwise listen on fixed ones.

    If the cluster is started here, LOOPBACK too; any other keeps the addresses by which its machines reach each other.
    """
    ports = {name: str(free_port()) for name in FIXED_PORTS}
    loopback = LOOPBACK if runs_here() else {}
    return {**RAY_FLAGS, **loopback, "RAY_SERVE_HAPROXY_BINARY_PATH": haproxy.command(), **ports}


def start_cluster(http: dict[str, Any], proxy_location: str, dashboard: bool, verbose: bool) -> str | None:
    """Start Ray here, or connect to the cluster that RAY_ADDRESS names.  Then start Serve on it.

    Return the address of Ray's dashboard, if it has one.
    """
    for name, value in ray_environment().items():
        os.environ.setdefault(name, value)
    import ray
    from ray import serve

    if runs_here():
        context = ray.init(address="local", include_dashboard=dashboard, log_to_driver=verbose)
    else:
        context = ray.init(log_to_driver=verbose)
    serve.start(proxy_location=proxy_location, http_options=http)
    dashboard_address: str | None = context.dashboard_url
    return dashboard_address


def stop_cluster() -> None:
    """Shut down Serve, and Ray if it was started here."""
    import ray
    from ray import serve

    if ray.is_initialized():
        serve.shutdown()
        ray.shutdown()


def connect() -> None:
    """Connect to the cluster, and to Serve in it.  Raises RuntimeError if there is no cluster, or no Serve in it."""
    import ray
    from ray.exceptions import RaySystemError
    from ray.serve.exceptions import RayServeException

    from deployments.serve_hooks import find_serve, look_on_loopback

    look_on_loopback()
    try:
        ray.init(address="auto", log_to_driver=False, logging_level="ERROR", ignore_reinit_error=True)
        find_serve()
        logging.getLogger("ray.serve").setLevel(logging.WARNING)  # what Serve does here is not what was asked for
    except (ConnectionError, RaySystemError) as error:
        raise RuntimeError(
            f"no Ray cluster can be reached; is Baton running, or should RAY_ADDRESS name another?  ({error})"
        ) from None
    except RayServeException as error:
        raise RuntimeError("the Ray cluster runs no Serve application") from error
