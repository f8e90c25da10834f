"""A pair of a decode and a prefill replica whose probe fails, on real Ray Serve with scripted engines."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from deployments.replica.link_record import read_links
from tests.conftest import eventually
from tests.serve.scripted import Diary
from tests.serve.test_handoff import TOKENS, Application, running, tokens_of

pytestmark = pytest.mark.serve


async def is_remote(app: Application) -> bool:
    deltas = await app.run("again")
    assert tokens_of(deltas) == TOKENS
    return any(delta.report is not None and delta.report.kind == "remote" for delta in deltas)


async def test_no_request_goes_over_a_link_that_failed_until_a_probe_succeeds(serve_url: str, tmp_path: Path) -> None:
    Diary(str(tmp_path)).write("links_broken")
    for app in running("links", tmp_path, prefill=1, decode=1):
        await app.wait_for(prefill=1, decode=1)
        (report,) = [delta.report for delta in await app.run("local") if delta.report]
        assert (report.kind, report.reason) == ("local", "no_usable_link")
        assert (await app.handle.health.remote())["state"] == "degraded"
        decode, prefill = [(await app.replicas())[role][0] for role in ("decode", "prefill")]
        (link,) = read_links("links", decode)
        assert (link.prefill_replica, link.problem) == (prefill, "the probe failed: told to")

        app.diary.erase("links_broken")

        await eventually(partial(is_remote, app), 60, "another probe succeeded")
        assert (await app.handle.health.remote())["state"] == "ready"
        assert [link.problem for link in read_links("links", decode)] == [""]
    assert not read_links("links", decode)
