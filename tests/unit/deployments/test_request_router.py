"""How Serve's router is told which replica to call, and how it calls it; and how it is left out."""

from __future__ import annotations

from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

import pytest

from app.errors import ReplicaLost
from deployments.frontend.request_router import PoolRequestRouter
from deployments.ready_replicas import ReadyReplicas
from deployments.serve_hooks import call_by_reference


class Replica:
    """A running replica as Serve's router knows it."""

    is_cross_language = False

    def __init__(self, unique_id: str) -> None:
        self.replica_id = SimpleNamespace(unique_id=unique_id)
        self.sent: list[tuple[Any, bool]] = []

    def try_send_request(self, pr: Any, with_rejection: bool) -> str:
        self.sent.append((pr, with_rejection))
        return "result"


def router_of(*replicas: Any) -> PoolRequestRouter:
    router = object.__new__(PoolRequestRouter)
    router._ready = ReadyReplicas()
    router._ready.update(list(replicas))
    return router


def call(replica: str) -> Any:
    return SimpleNamespace(kwargs={"replica_id": replica})


async def test_the_replica_that_a_call_names_gets_it() -> None:
    first, second = Replica("a"), Replica("b")
    found = await router_of(first, second)._choose_replica_for_request(call("b"))
    assert found.replica_id is second.replica_id
    assert found.try_send_request("call", False) == "result"
    assert (first.sent, second.sent) == ([], [("call", False)])


async def test_a_call_to_a_replica_that_is_gone_fails_at_once() -> None:
    with pytest.raises(ReplicaLost):
        await router_of(Replica("a"))._choose_replica_for_request(call("b"))


async def test_no_replica_is_asked_whether_it_takes_the_call() -> None:
    """It would answer by a generator, for which Ray holds up its event loop until the caller has got everything."""
    found: Any = await router_of(Replica("a"))._choose_replica_for_request(call("a"))
    assert found.is_cross_language  # Serve asks no replicas in other languages


OF_REQUEST: ContextVar[str] = ContextVar("OF_REQUEST", default="none")


async def test_a_call_by_reference_is_none_of_the_http_requests() -> None:
    """Serve would cancel it with the request in whose context it is made."""
    calls: list[tuple[Any, bool, str]] = []

    def send(call: Any, *, with_rejection: bool) -> Any:
        calls.append((call, with_rejection, OF_REQUEST.get()))
        return SimpleNamespace(to_object_ref=lambda: "reference")

    OF_REQUEST.set("one")
    replica: Any = SimpleNamespace(replica_id=SimpleNamespace(unique_id="a"), try_send_request=send)
    assert call_by_reference(replica, "attach", "channel", 7) == "reference"
    ((call, with_rejection, context),) = calls
    assert (call.args, call.kwargs) == (["channel", 7], {"replica_id": "a"})
    assert (call.metadata.call_method, call.metadata._by_reference) == ("attach", True)
    assert (with_rejection, context) == (False, "none")
