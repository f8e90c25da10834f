"""No background task ends unnoticed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

import pytest

from app import background as module
from app.background import BackgroundTasks, is_watched, watch
from app.errors import EngineDead
from tests.unit.waiting import until


class Owner:
    def __init__(self) -> None:
        self.deaths: list[EngineDead] = []
        self.tasks = BackgroundTasks("owner=o", self.deaths.append)
        self.starts: list[float] = []
        self.ending: asyncio.Queue[BaseException | None] = asyncio.Queue()

    async def work(self) -> None:
        self.starts.append(asyncio.get_running_loop().time())
        if (error := await self.ending.get()) is not None:
            raise error


@pytest.fixture
async def owner(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Owner]:
    monkeypatch.setattr(module, "FIRST_PAUSE_S", 0.01)
    owner = Owner()
    yield owner
    await owner.tasks.stop()


@pytest.mark.parametrize("ending", [RuntimeError("broken"), None])
async def test_what_can_begin_anew_does_and_says_so(
    owner: Owner, ending: Exception | None, caplog: pytest.LogCaptureFixture
) -> None:
    owner.tasks.keep("some-work", owner.work)
    owner.ending.put_nowait(ending)
    await until(lambda: len(owner.starts) == 2)
    assert "owner=o some-work" in caplog.text
    assert "started again" in caplog.text
    assert not owner.deaths


async def test_the_pauses_grow(owner: Owner) -> None:
    owner.tasks.keep("some-work", owner.work)
    for _ in range(4):
        owner.ending.put_nowait(RuntimeError("broken"))
    await until(lambda: len(owner.starts) == 5)
    pauses = [after - before for before, after in zip(owner.starts, owner.starts[1:], strict=False)]
    assert all(pause >= 0.01 * 2**number for number, pause in enumerate(pauses))


async def test_a_task_that_has_run_for_long_begins_with_the_first_pause(
    owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LONGEST_PAUSE_S", 0.1)
    owner.tasks.keep("some-work", owner.work)
    for _ in range(4):
        owner.ending.put_nowait(RuntimeError("broken"))
    await until(lambda: len(owner.starts) == 5)
    await asyncio.sleep(0.25)
    ended = asyncio.get_running_loop().time()
    owner.ending.put_nowait(RuntimeError("broken"))
    await until(lambda: len(owner.starts) == 6)
    assert owner.starts[-1] - ended < 0.08


async def test_the_engines_death_is_the_owners(owner: Owner) -> None:
    death = EngineDead("gone")
    owner.tasks.keep("some-work", owner.work)
    owner.ending.put_nowait(death)
    await until(lambda: owner.deaths == [death])
    await asyncio.sleep(0.03)
    assert len(owner.starts) == 1


@pytest.mark.parametrize(
    ("ending", "said"), [(RuntimeError("broken"), "broken"), (None, "ended"), (EngineDead("gone"), "gone")]
)
async def test_the_end_of_what_is_needed_is_the_owners(
    owner: Owner, ending: Exception | None, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    owner.tasks.need("some-work", owner.work)
    owner.ending.put_nowait(ending)
    await until(lambda: owner.deaths)
    assert said in str(owner.deaths[0])
    assert said in caplog.text


async def test_stopping_ends_all_or_those_that_are_named(owner: Owner) -> None:
    owner.tasks.keep("one", owner.work)
    owner.tasks.need("other", owner.work)
    tasks = [task for task in asyncio.all_tasks() if task in owner.tasks]
    assert all(map(is_watched, tasks))
    await asyncio.sleep(0)
    await owner.tasks.stop("one")
    assert {task.get_name(): task.done() for task in tasks} == {"one": True, "other": False}
    await owner.tasks.stop()
    await owner.tasks.stop()
    assert all(task.cancelled() for task in tasks)
    assert not owner.deaths


async def test_an_owner_is_told_of_the_death_of_a_task(caplog: pytest.LogCaptureFixture) -> None:
    deaths: list[BaseException] = []

    async def fail() -> None:
        raise ValueError("no")

    tasks = [asyncio.create_task(fail(), name="failing"), asyncio.create_task(asyncio.sleep(0))]
    endless = asyncio.create_task(asyncio.sleep(60))
    for task in (*tasks, endless):
        assert not is_watched(task)
        watch(task, deaths.append)
        assert is_watched(task)
    endless.cancel()
    await asyncio.wait([*tasks, endless])
    await until(lambda: deaths)
    assert [str(error) for error in deaths] == ["no"]
