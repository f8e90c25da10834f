"""Whoever started a task hears of its death, and only of that."""

from __future__ import annotations

import asyncio

import pytest

from app.background import is_watched, watch
from tests.unit.waiting import until


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
