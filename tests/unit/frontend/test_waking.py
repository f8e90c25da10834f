"""Requests for a model that sleeps wake it once, wait within a limit, and stop waiting when their clients leave."""

from __future__ import annotations

import asyncio
import math

import pytest

from app.errors import Asleep, InvalidRequest, NoReplica
from app.frontend import waking
from app.frontend.waking import Waker
from tests.unit.waiting import PATIENCE_S, until


class Model:
    """Sleeps until the test lets its replicas join."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, max_wake_s: float = math.inf) -> None:
        monkeypatch.setattr(waking, "WISH_S", 0.001)
        self.now = 100.0
        self.num_wishes = 0
        self.num_calls = 0
        self.is_awake = False
        self.fails = False
        self.waker = Waker("tiny", self.wish, max_wake_s, lambda: self.now)

    async def wish(self) -> None:
        self.num_wishes += 1
        if self.fails:
            self.fails = False
            raise RuntimeError("the GCS is away")

    async def serve(self) -> str:
        self.num_calls += 1
        if not self.is_awake:
            raise NoReplica("decode")
        return "served"

    def request(self) -> asyncio.Task[str]:
        return asyncio.create_task(self.waker.until_served(self.serve))


async def test_many_requests_wish_as_one_and_are_served_when_replicas_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Model(monkeypatch)
    requests = [model.request() for _ in range(20)]
    await until(lambda: model.num_wishes >= 3)
    assert model.num_calls == 20
    assert len([task for task in asyncio.all_tasks() if task.get_name() == "wake"]) == 1
    model.waker.on_join()  # the prefill pool's, with which nothing can be served yet
    await until(lambda: model.num_calls == 40)
    model.is_awake = True
    model.waker.on_join()
    async with asyncio.timeout(PATIENCE_S):
        assert await asyncio.gather(*requests) == ["served"] * 20
    assert model.waker.num_waiting == 0
    await until(lambda: not [task for task in asyncio.all_tasks() if task.get_name() == "wake"])


async def test_the_wish_is_repeated_although_one_could_not_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(monkeypatch)
    model.fails = True
    request = model.request()
    await until(lambda: model.num_wishes >= 2)
    request.cancel()


async def test_who_leaves_waits_no_longer_and_lets_the_model_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(monkeypatch)
    request = model.request()
    await until(lambda: model.num_wishes > 0)
    request.cancel()
    await asyncio.wait([request])
    assert model.waker.num_waiting == 0
    await until(lambda: not [task for task in asyncio.all_tasks() if task.get_name() == "wake"])
    model.now += 1000.0
    other = model.request()
    await until(lambda: model.num_calls == 2)
    model.now, model.is_awake = model.now + 7.0, True
    model.waker.on_join()
    await other
    assert model.waker._last_wake_s == 7.0, "the time in which nobody waited counts"


async def test_beyond_the_limit_a_request_is_told_when_to_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(monkeypatch, max_wake_s=0.01)
    with pytest.raises(Asleep) as first:
        await model.waker.until_served(model.serve)
    assert first.value.retry_after_s == 0.01, "nobody knows how long it takes"
    model = Model(monkeypatch, max_wake_s=60.0)
    request = model.request()
    await until(lambda: model.num_calls == 1)
    model.now, model.is_awake = 140.0, True  # it took 40 s
    model.waker.on_join()
    await request
    model.is_awake = False
    other = model.request()
    await until(lambda: model.num_calls == 3)
    model.waker._max_wake_s, model.now = 10.0, 151.0
    model.waker.on_join()
    with pytest.raises(Asleep) as second:
        await other
    assert second.value.retry_after_s == 29.0


async def test_another_error_ends_the_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(monkeypatch)

    async def refuse() -> str:
        raise InvalidRequest("no")

    with pytest.raises(InvalidRequest):
        await model.waker.until_served(refuse)
    assert model.waker.num_waiting == 0
