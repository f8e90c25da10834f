"""What happens between the deployments, on real Ray Serve with scripted engines."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from ray import serve

from app.errors import NoReplica, ReplicaLost
from app.messages import GenerateRequest, PrefillMode, TokenDelta
from tests.conftest import eventually, wait_until
from tests.serve.scripted import Diary, scripted_application

pytestmark = pytest.mark.serve

PROMPT = [10, 20, 30, 40]
TOKENS = [11, 21, 31, 41]


class Application:
    """The running application of scripted engines."""

    def __init__(self, name: str, handle: Any, diary: Diary) -> None:
        self.name = name
        self.diary = diary
        self.handle = handle

    def start(self, request_id: str, *, prompt: list[int] = PROMPT, mode: PrefillMode = "auto", **script: Any) -> Any:
        """Start a sequence.  The response yields its deltas and can be cancelled."""
        request = GenerateRequest(
            request_id=request_id,
            prompt_token_ids=prompt,
            sampling={"extra_args": script} if script else {},
            prefill_mode=mode,
        )
        return self.handle.run.options(stream=True).remote(request)

    async def run(self, request_id: str, **options: Any) -> list[TokenDelta]:
        return [delta async for delta in self.start(request_id, **options)]

    async def replicas(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = await self.handle.replicas.remote()
        return found

    async def wait_for(self, **counts: int) -> None:
        async def is_so() -> bool:
            replicas = await self.replicas()
            return all(len(replicas[role]) == count for role, count in counts.items())

        await eventually(is_so, 60, f"{counts} replicas")


def running(name: str, diary: Path, **options: Any) -> Iterator[Application]:
    application, notes = scripted_application(diary, **options)
    handle = serve.run(application, name=name, route_prefix=None)
    # This process has an event loop for each test, so the handle's router needs one of its own.
    handle._init(_run_router_in_separate_loop=True)
    yield Application(name, handle, notes)
    serve.delete(name)


@pytest.fixture(scope="module")
def app(serve_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    diary = tmp_path_factory.mktemp("diary")
    limits = {"prefill_timeout_s": 2, "ttft_timeout_s": 8, "itl_timeout_s": 1}
    yield from running("scripted", diary, prefill=1, decode=2, **limits)


def tokens_of(deltas: list[TokenDelta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


async def collect(app: Application, response: Any, request_id: str, into: list[TokenDelta]) -> None:
    """Collect deltas, and tell the engine when two tokens are there; it waits for this before it dies."""
    async for delta in response:
        into.append(delta)
        if len(tokens_of(into)) == 2:
            app.diary.write("tokens_received", request_id)


async def until_remote(app: Application) -> None:
    """Wait until requests go to prefill, which may be left out after an earlier test."""

    async def is_remote() -> bool:
        report = (await app.run("again"))[0].report
        return report is not None and report.kind == "remote"

    await eventually(is_remote, 30, "remote prefill")


async def test_kv_goes_from_prefill_to_decode(app: Application) -> None:
    await app.wait_for(prefill=1, decode=2)
    deltas = await app.run("plain")
    report = deltas[0].report
    assert tokens_of(deltas) == TOKENS
    assert report is not None
    assert (report.kind, report.transferred_tokens) == ("remote", len(PROMPT))
    assert [report.prefill_replica] == (await app.replicas())["prefill"]
    assert report.decode_replica in (await app.replicas())["decode"]


async def test_descriptor_is_never_unpickled_in_the_frontend(app: Application) -> None:
    await app.run("traced")
    unpickled_in = app.diary.pids("descriptor_unpickled")
    assert unpickled_in
    assert unpickled_in <= app.diary.pids("generate_started")
    assert not unpickled_in & app.diary.pids("caller")


@pytest.mark.parametrize(
    ("script", "reason"),
    [("fail", "prefill_failed"), ("hang", "prefill_timeout"), ("expired", "descriptor_expired")],
)
async def test_decode_prefills_itself_when_prefill_does_not_deliver(app: Application, script: str, reason: str) -> None:
    await until_remote(app)
    deltas = await app.run(f"prefill-{script}", prefill=script)
    assert tokens_of(deltas) == TOKENS
    assert deltas[0].report is not None
    assert (deltas[0].report.kind, deltas[0].report.reason) == ("local", reason)
    if script == "hang":
        wait_until(lambda: app.diary.count("prefill_cancelled", "prefill-hang"), 2, "the useless prefill cancelled")


async def test_kv_of_an_expired_handoff_is_released(app: Application) -> None:
    await until_remote(app)
    before = app.diary.count("released")
    await app.run("expired-release", prefill="expired")
    wait_until(lambda: app.diary.count("released") > before, 5, "release of the expired handoff")


async def test_cancel_during_prefill_stops_it(app: Application) -> None:
    await until_remote(app)
    response = app.start("cancel-prefill", prefill="hang")
    wait_until(lambda: app.diary.count("prefill_started", "cancel-prefill"), 5, "prefill started")
    response.cancel()
    wait_until(lambda: app.diary.count("prefill_cancelled", "cancel-prefill"), 1, "prefill cancelled")
    assert not app.diary.count("generate_started", "cancel-prefill")


@pytest.mark.parametrize("position", [0, 2])
async def test_cancel_during_decode_stops_it(app: Application, position: int) -> None:
    request_id = f"cancel-decode-{position}"
    response = app.start(request_id, decode_hangs_at=position)
    wait_until(lambda: app.diary.count("generate_started", request_id), 5, "decode started")
    response.cancel()
    wait_until(lambda: app.diary.count("generate_cancelled", request_id), 1, "decode cancelled")


async def test_a_prefill_is_abandoned_if_decode_does_not_get_its_kv(app: Application) -> None:
    await until_remote(app)
    response = app.start("abandon", decode_hangs_at=0)
    wait_until(lambda: app.diary.count("generate_started", "abandon"), 5, "decode started")
    response.cancel()
    wait_until(lambda: app.diary.count("abandoned", "abandon"), 2, "prefill told")


async def test_a_prefill_is_not_abandoned_once_decode_has_its_kv(app: Application) -> None:
    await until_remote(app)
    response = app.start("keep", decode_hangs_at=2)
    await anext(response)
    response.cancel()
    wait_until(lambda: app.diary.count("generate_cancelled", "keep"), 1, "decode cancelled")
    await asyncio.sleep(0.5)  # enough for it to come if it were sent
    assert not app.diary.count("abandoned", "keep")


async def test_a_token_that_takes_too_long_fails_the_sequence(app: Application) -> None:
    with pytest.raises(TimeoutError):
        await app.run("slow", decode_hangs_at=2)
    wait_until(lambda: app.diary.count("generate_cancelled", "slow"), 1, "decode cancelled")


async def test_decode_replica_dying_before_the_first_token_is_replaced(app: Application) -> None:
    await app.wait_for(decode=2)
    first, *_ = await app.run("who-decodes")  # the router may leave out the other one after an earlier test
    assert first.report is not None
    victim = first.report.decode_replica
    # Whichever replica is picked first, several sequences at once reach the victim.
    responses = [app.start(f"dies-{n}", decode_dies_at=0, decode_victim=victim) for n in range(4)]
    results = [[delta async for delta in response] for response in responses]
    assert [tokens_of(deltas) for deltas in results] == [TOKENS] * 4
    assert victim not in {deltas[0].report.decode_replica for deltas in results if deltas[0].report}
    # With another prefill on the other decode replica or, while that one is left out, whole on the prefill replica.
    retried = [n for n in range(4) if app.diary.count("generate_started", f"dies-{n}") == 2]
    assert retried, "no sequence had reached the victim"
    await app.wait_for(decode=2)


async def test_after_the_death_of_an_engine_the_sequence_goes_on_elsewhere(app: Application) -> None:
    await app.wait_for(decode=2)
    first, *_ = await app.run("who-decodes")
    assert first.report is not None
    victim = first.report.decode_replica
    results: dict[str, list[TokenDelta]] = {f"late-{n}": [] for n in range(4)}
    responses = {name: app.start(name, engine_dies_at=2, decode_victim=victim) for name in results}
    await asyncio.gather(*(collect(app, responses[name], name, into) for name, into in results.items()))
    assert [tokens_of(received) for received in results.values()] == [TOKENS] * 4
    resumed = [name for name in results if app.diary.count("generate_started", name) == 2]
    assert resumed, "no sequence had reached the victim"
    lost = first.report

    async def is_replaced() -> bool:
        return lost.decode_replica not in (await app.replicas())["decode"]

    await eventually(is_replaced, 30, "Serve replaced the replica with the dead engine")
    await app.wait_for(decode=2)


async def test_prefill_replica_dying_leaves_the_request_to_decode(app: Application) -> None:
    await until_remote(app)
    await app.wait_for(prefill=1)
    deltas = await app.run("prefill-dies", prefill="die")
    assert tokens_of(deltas) == TOKENS
    assert deltas[0].report is not None
    assert deltas[0].report.kind == "local"
    assert tokens_of(await app.run("meanwhile")) == TOKENS

    await until_remote(app)


async def test_sequences_of_a_frontend_that_died_are_stopped(app: Application) -> None:
    response = app.start("orphan", decode_hangs_at=0, prefill="ok")
    wait_until(lambda: app.diary.count("generate_started", "orphan"), 5, "decode started")
    caller = max(app.diary.pids("caller"))
    os.kill(caller, signal.SIGKILL)
    wait_until(lambda: app.diary.count("generate_cancelled", "orphan"), 5, "decode cancelled")
    response.cancel()
    wait_until(lambda: app.diary.pids("caller") - {caller}, 60, "another frontend")
    await app.wait_for(prefill=1, decode=2)


async def test_without_a_decode_replica_the_error_says_so(serve_url: str, tmp_path: Path) -> None:
    for app in running("lonely", tmp_path, prefill=0, decode=1, max_attempts=2):
        await app.wait_for(decode=1)
        with pytest.raises((NoReplica, ReplicaLost)):
            await app.run("dies", decode_dies_at=0)
        await app.wait_for(decode=1)
        deltas = await app.run("after")
        assert tokens_of(deltas) == TOKENS
        assert deltas[0].report is not None
        assert deltas[0].report.reason == "aggregated"


async def _has_counted(diary: Diary, event: str, count: int) -> bool:
    return diary.count(event) == count


async def start_waiting(app: Application, count: int, event: str) -> list[asyncio.Task[list[TokenDelta]]]:
    """Start sequences that stop after two tokens until the diary has the event."""
    tasks = [asyncio.create_task(app.run(f"{event}-{n}", decode_waits_at=2, event=event)) for n in range(count)]

    async def have_started() -> bool:
        return all(app.diary.count("generate_started", f"{event}-{n}") for n in range(count))

    await eventually(have_started, 20, "all sequences started")
    return tasks


async def test_a_decode_pool_scales_by_its_sequences_and_loses_none(serve_url: str, tmp_path: Path) -> None:
    autoscaling = {
        "min_replicas": 1,
        "max_replicas": 3,
        "target_ongoing_requests": 2,
        "upscale_delay_s": 0.5,
        "downscale_delay_s": 0.5,
        "metrics_interval_s": 0.2,
        "look_back_period_s": 0.5,
    }
    for app in running("scales", tmp_path, prefill=0, decode=1, autoscaling=autoscaling):
        await app.wait_for(decode=1)
        early = await start_waiting(app, 6, "first")
        await app.wait_for(decode=3)
        late = await start_waiting(app, 2, "second")
        app.diary.write("first")
        assert [tokens_of(deltas) for deltas in await asyncio.gather(*early)] == [TOKENS] * 6
        # Two sequences are left, on the two new replicas: at least one of those goes while it has one.
        await app.wait_for(decode=1)
        removed: Callable[[], Awaitable[bool]] = partial(_has_counted, app.diary, "removed", 2)
        await eventually(removed, 20, "Serve ended two replicas")
        app.diary.write("second")
        results = await asyncio.gather(*late)
        assert [tokens_of(deltas) for deltas in results] == [TOKENS] * 2
        assert len({deltas[0].report.decode_replica for deltas in results if deltas[0].report}) == 2
