"""A task that outlives its request fails for somebody to see."""

from __future__ import annotations

import asyncio

import pytest

from deployments.detached import spawn_detached


async def test_what_a_detached_task_raises_is_logged_and_its_cancellation_is_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def fail() -> None:
        raise RuntimeError("broken")

    failing, cancelled = spawn_detached(fail(), "failing"), spawn_detached(asyncio.sleep(60), "cancelled")
    cancelled.cancel()
    await asyncio.wait([failing, cancelled])
    await asyncio.sleep(0)
    assert "failing failed" in caplog.text
    assert "broken" in caplog.text
    assert "cancelled" not in caplog.text
