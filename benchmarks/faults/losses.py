"""``python -m benchmarks.faults.losses``: decode replicas that are killed by thousands, under load.

A replica of an application takes seconds to come back, so campaigns lose some hundred of them in an hour.  Here they
are processes forked from one that has imported everything, which are there in tenths of a second, and nothing is Ray's.
All else is production's: simulated engines, channels over TCP, the router and the orchestrator.  So this is about
sequences that go on elsewhere (docs/decisions/0030-resume.md), and nothing else.  All prompts are computed where they
are decoded.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from typing import Annotated, Any

import msgspec
import numpy
import typer
from rich.console import Console

from app.autoscaling.load import LoadMeter
from app.background import BackgroundTasks
from app.channel.client import Channel
from app.channel.protocol import Submit
from app.channel.server import ChannelServer, FrontendChannel
from app.cli.entry import run_app, to_app
from app.config import LimitsConfig, RoutingConfig, SloConfig
from app.engines.base import EngineSpec
from app.engines.registry import create_engine
from app.errors import BatonError, ReplicaLost
from app.frontend.attempt import Handoff
from app.frontend.orchestrator import Orchestrator
from app.frontend.sequence_progress import SequenceProgress
from app.messages import EngineStats, GenerateRequest, ReplicaInfo, ReplicaLoad
from app.models.source import local_path
from app.recent_load import RecentLoad
from app.routing.router import Router
from deployments.replica.publisher import Publisher
from deployments.replica.sequences import Sequences

ENGINE_ARGS: dict[str, Any] = {"profile": "h200-llama-8b", "speed_up": 3, "max_model_len": 1024, "num_blocks": 1024}
NUM_QUESTIONS, PROMPT_TOKENS, OUTPUT_TOKENS = 40, 100, 32
LEAST = 3
"""A replica is killed only while so many others are there."""
START_TIMEOUT_S = 60.0


def serve(replica_id: str, pipe: Connection) -> None:
    """Be a replica, in a process of its own, until somebody ends it."""
    asyncio.run(_serve(replica_id, pipe))


async def _serve(replica_id: str, pipe: Connection) -> None:
    spec = EngineSpec(
        role="decode",
        is_disaggregated=False,
        replica_id=replica_id,
        model_path=local_path("baton:tiny"),
        device="cpu",
        tensor_parallel_size=1,
        engine_args=ENGINE_ARGS,
    )
    engine = create_engine("sim", spec)
    info = await engine.start()
    sequences = Sequences(engine, LoadMeter(), RecentLoad(None))

    async def run(channel: FrontendChannel, call: Submit) -> None:
        await sequences.run(channel, call, None, call.local_reason)

    def observe(stats: EngineStats) -> ReplicaLoad:
        return ReplicaLoad(sequences=server.num_sequences(), decoding=sequences.phases["decoding"])

    server = ChannelServer(replica_id, run)
    died: asyncio.Future[object] = asyncio.get_running_loop().create_future()
    background = BackgroundTasks(f"replica_id={replica_id}", died.set_result)
    publisher = Publisher(replica_id, engine, info, server, observe, background)
    sequences.on_change = publisher.poll_soon
    described = ReplicaInfo(
        replica_id=replica_id,
        role="decode",
        model="tiny",
        engine=info.engine,
        engine_version=info.version,
        node_ip="127.0.0.1",
        pid=multiprocessing.current_process().pid or 0,
        num_blocks=info.num_blocks,
        block_size_tokens=info.block_size_tokens,
        max_model_len=info.max_model_len,
        max_sequences=info.max_sequences,
        prefix_cache=info.prefix_cache,
    )
    pipe.send((msgspec.to_builtins(described), await server.start("127.0.0.1")))
    await died


class Replicas:
    """Starts replicas, connects to them, and calls them: what a frontend's pools do with Ray."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__])
        self._num_started = 0
        self.running: dict[str, Any] = {}
        """The processes of those that nobody has killed."""
        self._channels: dict[str, Channel] = {}
        """Those that stand, as the router knows them."""
        self.has_come = asyncio.Event()
        """Set whenever a replica has come."""

    async def start(self) -> None:
        self._num_started += 1
        name = f"decode-{self._num_started}"
        here, there = self._context.Pipe()
        process = self._context.Process(target=serve, args=(name, there), name=name, daemon=True)
        await asyncio.to_thread(process.start)
        there.close()
        if not await asyncio.to_thread(here.poll, START_TIMEOUT_S):
            raise TimeoutError(f"{name} did not start within {START_TIMEOUT_S:.0f} s")
        info, address = here.recv()
        here.close()
        channel = await Channel.connect(name, address, self._router.by_role)
        self._router.by_role.join(msgspec.convert(info, ReplicaInfo))
        self.running[name] = process
        self._channels[name] = channel
        channel.on_close = partial(self._forget, name)
        self.has_come.set()

    def _forget(self, name: str) -> None:
        self.running.pop(name, None)
        del self._channels[name]
        self._router.by_role.leave(name)

    async def kill(self, name: str) -> None:
        """Kill a replica, and start another one.  Until its connection breaks, the router knows it as before."""
        process = self.running.pop(name)
        process.kill()
        await asyncio.to_thread(process.join)
        assert process.exitcode == -signal.SIGKILL
        process.close()
        await self.start()

    async def stop(self) -> None:
        for name, process in list(self.running.items()):
            self._channels[name].close()
            process.terminate()
            await asyncio.to_thread(process.join)

    async def generate(
        self,
        request: GenerateRequest,
        handoff: Handoff | None,
        local_reason: str,
        replica: str,
        progress: SequenceProgress,
    ) -> None:
        if (channel := self._channels.get(replica)) is None:
            raise ReplicaLost(replica)
        sequence = channel.submit(request, progress.take, has_handoff=False, local_reason=local_reason)
        try:
            await sequence.ended
        finally:
            channel.finish(sequence)


@dataclass
class Outcome:
    """What came of all answers."""

    num_killed: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    """``right``, ``wrong``, or the error with which an answer ended."""
    num_resumed: int = 0
    """Answers that went on elsewhere, some more than once."""
    gaps_s: list[float] = field(default_factory=list)
    """The longest time without a token of each of these."""
    num_refused: int = 0
    """Retries for which the budget of the frontend had nothing left (app/routing/retry_budget.py)."""


class Load:
    """Asks one question after another, in several streams, and compares the answers with those without losses."""

    def __init__(self, orchestrator: Orchestrator, seed: int) -> None:
        draw = random.Random(seed)
        self._orchestrator = orchestrator
        self._prompts = [draw.choices(range(300, 2000), k=PROMPT_TOKENS) for _ in range(NUM_QUESTIONS)]
        self._sampling: list[dict[str, Any]] = [
            {
                "max_tokens": OUTPUT_TOKENS,
                "ignore_eos": True,
                **({"temperature": 1.0, "seed": number} if number % 2 else {}),
            }
            for number in range(NUM_QUESTIONS)
        ]
        self._right: list[list[int]] = []
        self._num_asked = 0
        self.outcome = Outcome()
        self.is_over = False

    async def ask_undisturbed(self) -> None:
        for number in range(NUM_QUESTIONS):
            self._right.append((await self._ask(number)).token_ids)

    async def stream(self, seed: int) -> None:
        """Ask until `is_over`."""
        draw = random.Random(seed)
        while not self.is_over:
            number = draw.randrange(NUM_QUESTIONS)
            try:
                progress = await self._ask(number)
            except (BatonError, TimeoutError) as error:
                self.outcome.ends[type(error).__name__] += 1
                continue
            self.outcome.ends["right" if progress.token_ids == self._right[number] else "wrong"] += 1

    async def _ask(self, number: int) -> SequenceProgress:
        self._num_asked += 1
        heard_at: list[float] = []
        num_attempts = 0

        def attempt(_: object) -> None:
            nonlocal num_attempts
            num_attempts += 1

        progress = SequenceProgress(lambda _: heard_at.append(time.monotonic()))
        request = GenerateRequest(
            request_id=f"request-{self._num_asked}",
            prompt_token_ids=self._prompts[number],
            sampling=self._sampling[number],
        )
        await self._orchestrator.run(request, progress, on_decision=attempt)
        if num_attempts > 1:
            self.outcome.num_resumed += 1
            self.outcome.gaps_s.append(max(numpy.diff(heard_at), default=0.0))
        return progress


async def lose(num: int, num_replicas: int, num_streams: int, pause_s: float, seed: int) -> Outcome:
    """Kill `num` of `num_replicas` replicas one after another, each at a random moment of `pause_s` seconds."""
    draw = random.Random(seed)
    router = Router(RoutingConfig(), SloConfig(), has_prefill=False)
    replicas = Replicas(router)
    orchestrator = Orchestrator(router, None, replicas, LimitsConfig())
    load = Load(orchestrator, seed)
    try:
        for _ in range(num_replicas):
            await replicas.start()
        await load.ask_undisturbed()
        async with asyncio.TaskGroup() as tasks:
            for number in range(num_streams):
                tasks.create_task(load.stream(number))
            async with asyncio.TaskGroup() as losses:
                while load.outcome.num_killed < num:
                    await asyncio.sleep(draw.uniform(0, 2 * pause_s))
                    while len(replicas.running) <= LEAST:
                        replicas.has_come.clear()
                        await replicas.has_come.wait()
                    losses.create_task(replicas.kill(draw.choice(sorted(replicas.running))))
                    load.outcome.num_killed += 1
            load.is_over = True
        load.outcome.num_refused = orchestrator.retry_budget.num_refused
    finally:
        await replicas.stop()
    return load.outcome


def bench_losses(
    num: Annotated[int, typer.Option(min=1, help="How many replicas are killed.")] = 2000,
    replicas: Annotated[int, typer.Option(min=3, help="How many there are.")] = 8,
    streams: Annotated[int, typer.Option(min=1, help="Of requests at a time.")] = 16,
    pause_s: Annotated[float, typer.Option(min=0.0, help="The mean time between two losses.")] = 0.2,
    seed: Annotated[int, typer.Option(help="Of prompts, victims and moments.")] = 0,
) -> None:
    """Kill decode replicas under load, and compare every answer with that without losses.

    Exits with 1 if one was wrong.
    """
    logging.getLogger("baton").setLevel(logging.ERROR)  # each loss is a warning for each of its sequences
    outcome = asyncio.run(lose(num, replicas, streams, pause_s, seed))
    console = Console(highlight=False)
    total = outcome.ends.total()
    console.print(f"{outcome.num_killed} replicas killed, {total} answers: {dict(outcome.ends)}")
    console.print(f"{outcome.num_resumed} went on elsewhere; for {outcome.num_refused} the budget of retries was spent")
    if outcome.gaps_s:
        half, most, longest = (1e3 * gap for gap in numpy.percentile(outcome.gaps_s, [50, 99, 100]))
        console.print(f"their longest gap in ms: p50 {half:.0f}, p99 {most:.0f}, max {longest:.0f}")
    if outcome.ends["wrong"]:
        raise typer.Exit(1)


if __name__ == "__main__":
    run_app(to_app(bench_losses), "benchmarks.faults.losses")
