"""What frontends know of replicas: their caches, their load, and whether they are there."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
from ray import serve

from app.kv_cache.block_hashes import block_hashes, root_hash
from app.messages import GenerateRequest, Role, TokenDelta
from app.routing.pool_state import PoolState
from app.routing.prefix_index import PrefixIndex
from app.routing.role_pools import RolePools
from deployments.frontend.pool_channels import PoolChannels
from tests.conftest import eventually
from tests.serve.scripted import BLOCK_SIZE, PREFILL_S
from tests.serve.test_handoff import Application, running, tokens_of

pytestmark = pytest.mark.serve


@pytest.fixture(scope="module")
def app(serve_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Application]:
    yield from running("pool-states", tmp_path_factory.mktemp("diary"), prefill=1, decode=1, aggregated=1)


@asynccontextmanager
async def another_frontend(role: str) -> AsyncIterator[PoolState]:
    """Make this process a frontend that starts later than the application's own, and yield its pool state."""
    async with connected(role) as channels:
        yield channels._pool


@asynccontextmanager
async def connected(role: str) -> AsyncIterator[PoolChannels]:
    handle = serve.get_deployment_handle(f"{role}-scripted", "pool-states")
    if not handle.is_initialized:
        handle._init(_run_router_in_separate_loop=True)
    home = cast(Role, role)
    channels = PoolChannels(handle, RolePools({home: PoolState(PrefixIndex())}), home)
    yield channels
    channels._ready.on_change = None
    for replica in list(channels._channels):
        channels._leave(replica).close()
    for task in channels._connecting.values():
        task.cancel()


async def stats(app: Application) -> dict[str, dict[str, Any]]:
    """Return what the application's frontend knows of the only replica of each pool."""
    replicas = await app.handle.stats.remote()
    return {replica["role"]: replica.get("view") or {} for replica in replicas}


async def wait_for(app: Application, role: str, **values: int) -> None:
    async def is_so() -> bool:
        state = (await stats(app)).get(role, {})
        return {name: state.get(name) for name in values} == values

    await eventually(is_so, 10, f"{role} {values}")


def hashes(prompt: list[int]) -> list[int]:
    return list(block_hashes(prompt, BLOCK_SIZE, root_hash(None)))


async def held(state: PoolState, prompt: list[int]) -> None:
    """Return when one replica of the pool holds all of a prompt."""

    async def is_held() -> bool:
        return list(state.index.match(hashes(prompt)).values()) == [len(hashes(prompt))]

    await eventually(is_held, 10, "the prompt in the pool state")


async def test_what_a_prompt_leaves_in_the_caches_is_known_to_every_frontend(app: Application) -> None:
    await app.wait_for(prefill=1, decode=1, aggregated=1)
    assert all(endpoint["prefix_cache"] == "published" for endpoint in await app.handle.endpoints.remote())
    before = await stats(app)
    prompt = [1, 2, 3, 4, 5, 6, 7]
    async with another_frontend("prefill") as early:
        await eventually(lambda: asyncio.sleep(0, early.replicas), 10, "a connection")
        deltas = await app.run("cached", prompt=prompt)
        await held(early, prompt)
    for role in ("prefill", "decode"):
        await wait_for(app, role, cached_blocks=before[role]["cached_blocks"] + 3)
        async with another_frontend(role) as late:
            await held(late, prompt)
    assert (await stats(app))["aggregated"]["cached_blocks"] == 0
    report = deltas[0].report
    assert report is not None
    assert (report.prefill_s, report.prefill_cached_tokens) == (PREFILL_S, 0)


async def test_the_load_of_one_frontend_is_known_to_the_other(app: Application) -> None:
    await app.wait_for(prefill=1, decode=1)
    async with another_frontend("decode") as decode, another_frontend("prefill") as prefill:
        await eventually(lambda: asyncio.sleep(0, decode.replicas and prefill.replicas), 10, "connections")
        (at_decode,), (at_prefill,) = decode.replicas.values(), prefill.replicas.values()

        async def is_loaded(*wanted: int) -> None:
            async def is_so() -> bool:
                return wanted == (
                    at_prefill.sequences.value,
                    at_decode.sequences.value,
                    at_decode.queued_tokens.value,
                )

            await eventually(is_so, 10, f"load {wanted}")

        await is_loaded(0, 0, 0)
        waiting = app.start("load-prefill", prefill="hang")
        await is_loaded(1, 1, 0)
        local = app.start("load-decode", decode_hangs_at=0, mode="local")
        decoding = app.start("load-decode-2", decode_hangs_at=1)
        await is_loaded(1, 2, 0)  # the aggregated pool has the local one
        for response in (waiting, local, decoding):
            response.cancel()
        await is_loaded(0, 0, 0)


async def test_a_prefill_replica_runs_whole_sequences_on_its_channel(app: Application) -> None:
    await app.wait_for(prefill=1)
    request = GenerateRequest(request_id="whole", prompt_token_ids=[1, 2], sampling={})
    deltas: list[TokenDelta] = []
    async with connected("prefill") as channels:
        await eventually(lambda: asyncio.sleep(0, channels._channels), 10, "a connection")
        (channel,) = channels._channels.values()
        sequence = channel.submit(request, deltas.append, has_handoff=False, local_reason="decode_full")
        await sequence.ended
        channel.finish(sequence)
        assert [token for delta in deltas for token in delta.token_ids] == [2, 3]
        assert deltas[0].report is not None
        assert (deltas[0].report.kind, deltas[0].report.reason) == ("local", "decode_full")
        assert not channel.is_closed


async def test_a_local_prefill_is_the_aggregated_pools_and_counts_as_its_queue(app: Application) -> None:
    await app.wait_for(aggregated=1)
    response = app.start("queue", decode_hangs_at=0, mode="local", prompt=[1, 2, 3])
    async with another_frontend("aggregated") as state:

        async def is_queued() -> bool:
            return [replica.queued_tokens.value for replica in state.replicas.values()] == [3]

        await eventually(is_queued, 10, "three tokens in the queue")
    await wait_for(app, "aggregated", sequences=1, own_sequences=1, queued_tokens=3)
    response.cancel()
    await wait_for(app, "aggregated", sequences=0, own_sequences=0, queued_tokens=0)
    deltas = await app.run("local", mode="local")
    assert deltas[0].report is not None
    assert deltas[0].report.decode_replica == (await app.replicas())["aggregated"][0]
    assert (deltas[0].report.kind, deltas[0].report.reason) == ("local", "requested")


async def test_a_new_frontend_knows_the_caches_from_the_start(app: Application) -> None:
    await app.wait_for(prefill=1, decode=1)
    await app.run("before", prompt=[50, 51, 52, 53, 54, 55])
    cached = {role: state["cached_blocks"] for role, state in (await stats(app)).items()}
    caller = max(app.diary.pids("caller"))
    os.kill(caller, signal.SIGKILL)
    await eventually(lambda: asyncio.sleep(0, app.diary.pids("caller") - {caller}), 60, "another frontend")

    async def knows() -> bool:
        return {role: state.get("cached_blocks") for role, state in (await stats(app)).items()} == cached

    await eventually(knows, 20, f"the new frontend knows {cached}")
    assert min(cached["prefill"], cached["decode"]) >= 3


async def test_a_replica_that_dies_leaves_at_once_and_its_successor_begins_with_nothing(app: Application) -> None:
    await app.wait_for(prefill=1, decode=1, aggregated=1)
    await app.run("fill", prompt=[60, 61, 62, 63])
    (victim,) = (await app.replicas())["prefill"]
    health = await app.handle.endpoints.remote()
    (pid,) = [endpoint["pid"] for endpoint in health if endpoint["replica_id"] == victim]
    async with another_frontend("prefill") as state:
        await eventually(lambda: asyncio.sleep(0, victim in state.replicas), 10, "the victim in the pool state")
        os.kill(pid, signal.SIGKILL)
        await eventually(lambda: asyncio.sleep(0, victim not in state.replicas), 2, "the victim out of the pool state")
        assert not state.index.match(hashes([60, 61, 62, 63]))
    await app.wait_for(prefill=0)
    assert (await app.handle.health.remote())["state"] == "degraded"
    assert tokens_of(await app.run("meanwhile")) == [11, 21, 31, 41]
    await app.wait_for(prefill=1)
    assert victim not in (await app.replicas())["prefill"]
    await wait_for(app, "prefill", cached_blocks=0)

    async def is_linked() -> bool:
        return bool((await app.handle.health.remote())["state"] == "ready")

    await eventually(is_linked, 10, "a link to the successor")
    await app.run("refill", prompt=[60, 61, 62, 63])
    await wait_for(app, "prefill", cached_blocks=2)
