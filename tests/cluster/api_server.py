"""A Kubernetes API server of a few lines, for the real kubectl: it keeps objects, and checks nothing of them."""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

import yaml

Object = dict[str, Any]

KINDS: dict[str, dict[str, str]] = {
    "v1": {
        "namespaces": "Namespace",
        "nodes": "Node",
        "pods": "Pod",
        "secrets": "Secret",
        "services": "Service",
        "configmaps": "ConfigMap",
        "persistentvolumeclaims": "PersistentVolumeClaim",
    },
    "ray.io/v1": {"rayservices": "RayService", "rayclusters": "RayCluster"},
    "karpenter.sh/v1": {"nodepools": "NodePool"},
    "storage.k8s.io/v1": {"storageclasses": "StorageClass"},
}
CLUSTER_WIDE = {"Namespace", "Node", "NodePool", "StorageClass"}
VERBS = ["create", "delete", "get", "list", "patch", "watch"]


class Call(NamedTuple):
    """A request that changes something."""

    method: str
    path: str
    query: dict[str, list[str]]
    body: Any


class ApiServer(ThreadingHTTPServer):
    """`groups` are the API versions that it has; `objects` are kept by their path."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.groups = list(KINDS)
        self.objects: dict[str, Object] = {}
        self.calls: list[Call] = []
        self.reads: Counter[str] = Counter()
        """How often each path was asked for."""

    def add(self, api_version: str, kind: str, name: str, namespace: str = "baton", **fields: Any) -> Object:
        """An object, with `labels` in its metadata; it goes when its `owner` does."""
        metadata: Object = {
            "name": name,
            "labels": fields.pop("labels", {}),
            "uid": name,
            "resourceVersion": "1",
            "generation": 1,
        }
        metadata["ownerReferences"] = [{"name": fields.pop("owner", None)}]
        if kind not in CLUSTER_WIDE:
            metadata["namespace"] = namespace
        thing = {"apiVersion": api_version, "kind": kind, "metadata": metadata, **fields}
        self.objects[path_of(api_version, kind, name, namespace)] = thing
        return thing

    def names(self, kind: str) -> list[str]:
        return sorted(each["metadata"]["name"] for each in self.objects.values() if each["kind"] == kind)

    def write_kubeconfig(self, path: Path) -> None:
        """One whose only context is this server."""
        cluster = {"name": "here", "cluster": {"server": self.url}}
        context = {"name": "here", "context": {"cluster": "here", "user": "me"}}
        config = {"apiVersion": "v1", "kind": "Config", "current-context": "here", "users": [{"name": "me"}]}
        path.write_text(yaml.safe_dump({**config, "clusters": [cluster], "contexts": [context]}))


def path_of(api_version: str, kind: str, name: str, namespace: str) -> str:
    root = f"/api/{api_version}" if "/" not in api_version else f"/apis/{api_version}"
    plural = {kind: plural for kinds in KINDS.values() for plural, kind in kinds.items()}[kind]
    return f"{root}/{plural}/{name}" if kind in CLUSTER_WIDE else f"{root}/namespaces/{namespace}/{plural}/{name}"


class Handler(BaseHTTPRequestHandler):
    server: ApiServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        path, query = self._target()
        self.server.reads[path] += 1
        found = self._discover(path) or self._describe_fields(path) or self.server.objects.get(path)
        if found is not None:
            self._answer(200, found)
        elif (kind := self._kind_of_list(path)) is not None:
            self._answer(200, self._list(path, kind, query))
        else:
            self._refuse(404, f"{path} not found")

    def do_POST(self) -> None:
        path, query = self._target()
        body = self._body()
        self.server.calls.append(Call("POST", path, query, body))
        body["metadata"].setdefault("ownerReferences", [])
        self.server.objects[f"{path}/{body['metadata']['name']}"] = body
        self._answer(201, body)

    def do_PATCH(self) -> None:
        path, query = self._target()
        body = self._body()
        self.server.calls.append(Call("PATCH", path, query, body))
        thing = self.server.objects.setdefault(path, {})
        _merge(thing, body)
        self._answer(200, thing)

    def do_DELETE(self) -> None:
        path, query = self._target()
        self.server.calls.append(Call("DELETE", path, query, self._body()))
        if (thing := self.server.objects.pop(path, None)) is None:
            self._refuse(404, f"{path} not found")
            return
        owner = {"name": thing["metadata"]["name"]}
        owned = [each for each, it in self.server.objects.items() if owner in it["metadata"]["ownerReferences"]]
        for each in owned:
            del self.server.objects[each]
        self._answer(200, {"kind": "Status", "apiVersion": "v1", "status": "Success"})

    def _target(self) -> tuple[str, dict[str, list[str]]]:
        parts = urlsplit(self.path)
        return parts.path, parse_qs(parts.query)

    def _body(self) -> Any:
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if (protobuf := re.match(rb"k8s\0.*?Namespace.*?([a-z0-9-]{2,})", data, re.DOTALL)) is not None:
            return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": protobuf[1].decode()}}
        return yaml.safe_load(data or b"{}")

    def _discover(self, path: str) -> Object | None:
        groups = [group for group in self.server.groups if "/" in group]
        if path == "/version":
            return {"major": "1", "minor": "33", "gitVersion": "v1.33.0"}
        if path == "/api":
            return {"kind": "APIVersions", "versions": ["v1"]}
        if path == "/apis":
            versions = [{"groupVersion": group, "version": group.split("/")[1]} for group in groups]
            listed = [{"name": each["groupVersion"].split("/")[0], "versions": [each]} for each in versions]
            return {"kind": "APIGroupList", "apiVersion": "v1", "groups": listed}
        version = path.removeprefix("/apis/").removeprefix("/api/")
        if version not in self.server.groups:
            return None
        resources = [
            {"name": plural, "kind": kind, "namespaced": kind not in CLUSTER_WIDE, "verbs": VERBS}
            for plural, kind in KINDS[version].items()
        ]
        return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": resources}

    def _describe_fields(self, path: str) -> Object | None:
        """The OpenAPI documents, as far as kubectl looks there for whether the server checks fields itself."""
        roots = {version: f"apis/{version}" if "/" in version else f"api/{version}" for version in self.server.groups}
        if path == "/openapi/v3":
            return {"paths": {root: {"serverRelativeURL": f"/openapi/v3/{root}"} for root in roots.values()}}
        for version, root in roots.items():
            if path == f"/openapi/v3/{root}":
                group, _, number = version.rpartition("/")
                return {"openapi": "3.0.0", "paths": dict(_patches(root, group, number, KINDS[version]))}
        return None

    def _kind_of_list(self, path: str) -> tuple[str, str] | None:
        """The API version and kind of the objects that a path lists."""
        for version in self.server.groups:
            for plural, kind in KINDS[version].items():
                if path.endswith(f"/{plural}") and f"/{version}/" in path:
                    return version, kind
        return None

    def _list(self, path: str, kind: tuple[str, str], query: dict[str, list[str]]) -> Object:
        wanted = dict(pair.split("=") for pair in query.get("labelSelector", [""])[0].split(",") if pair)
        phase = query.get("fieldSelector", [""])[0].removeprefix("status.phase=")
        items = [
            thing
            for name, thing in self.server.objects.items()
            if name.rpartition("/")[0] == path
            and wanted.items() <= thing["metadata"].get("labels", {}).items()
            and phase in ("", thing.get("status", {}).get("phase"))
        ]
        return {"apiVersion": kind[0], "kind": f"{kind[1]}List", "metadata": {}, "items": items}

    def _refuse(self, code: int, message: str) -> None:
        reason = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": code}
        self._answer(code, {**reason, "message": message})

    def _answer(self, code: int, content: Object) -> None:
        text = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _patches(root: str, group: str, version: str, kinds: dict[str, str]) -> Iterator[tuple[str, Object]]:
    for plural, kind in kinds.items():
        yield (
            f"/{root}/{plural}",
            {
                "patch": {
                    "parameters": [{"name": "fieldValidation", "in": "query"}],
                    "x-kubernetes-group-version-kind": {"group": group, "version": version, "kind": kind},
                    "responses": {},
                }
            },
        )


def _merge(thing: Object, patch: Object) -> None:
    for key, value in patch.items():
        if isinstance(value, dict) and isinstance(thing.get(key), dict):
            _merge(thing[key], value)
        else:
            thing[key] = value


@contextmanager
def serving() -> Iterator[ApiServer]:
    with ApiServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
