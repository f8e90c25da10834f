"""Exceptions inside the processes of real engines, by the agent (agent_calls.py): in what the engine does in each step,
in what Baton's plug-ins do there, and in its threads."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from random import Random
from typing import Any, Literal

import msgspec
import psutil

from benchmarks.faults.agent_calls import call
from benchmarks.faults.deployed import BadAnswer
from benchmarks.faults.fleet import Fleet, Target

INSIDE = "benchmarks.faults.inside_engine"
COMES_S = 60.0
"""How long it may take until an engine under load calls what is to raise."""
REPLACED_S = 120.0
"""How long it may take until an engine has ended that cannot go on."""
GOES_ON_S = 3.0
"""How long an engine is watched that has to go on."""
POLL_S = 0.1


class EngineFault(msgspec.Struct, frozen=True):
    """One call or one thread of one engine raises."""

    target: Target
    what: str
    where: str
    """``module:function`` that raises at its next call; for a thread a part of its name."""
    then: Literal["ends", "goes on"] = "ends"
    """What the engine has to do.  Replicas whose engines have ended are replaced."""

    @property
    def name(self) -> str:
        return f"exception in {self.target}'s {self.what}"

    @property
    def is_in_thread(self) -> bool:
        return ":" not in self.where

    async def strike(self, fleet: Fleet, random: Random) -> None:
        """Raises LookupError if the engine has no such thing or does not do it, and BadAnswer if it should have ended
        and goes on, or the reverse."""
        victim = random.choice(await fleet.victims(self.target))
        replica = fleet.replica_of(victim[0])
        struck = [process for process in victim if await self._prepare(process)]
        if not struck:
            raise LookupError(f"no process of this {self.target} has {self.where}")
        if self.then == "ends":
            # Until the replica has ended too, all may seem to be whole.
            _, alive = await asyncio.to_thread(psutil.wait_procs, [*struck, replica], COMES_S + REPLACED_S)
            if alive:
                raise BadAnswer(f"the {self.target} goes on without its {self.what}")
            return
        if not self.is_in_thread:
            await self._until_raised(struck)
        ended, _ = await asyncio.to_thread(psutil.wait_procs, struck, GOES_ON_S)
        if ended:
            raise BadAnswer(f"the {self.target} has ended, by what one request alone should feel")

    async def _prepare(self, process: psutil.Process) -> bool:
        try:
            if self.is_in_thread:
                await _inside(process, "throw_into_thread", name=self.where)
            else:
                await _inside(process, "break_call", function=self.where)
        except LookupError:  # it is another process of the engine that has it
            return False
        return True

    async def _until_raised(self, struck: list[psutil.Process]) -> None:
        deadline = time.monotonic() + COMES_S
        while all([await _inside(process, "is_waiting", function=self.where) for process in struck]):
            if time.monotonic() > deadline:
                raise LookupError(f"nobody called {self.where}")
            await asyncio.sleep(POLL_S)


async def _inside(process: psutil.Process, what: str, /, **arguments: str) -> Any:
    return await asyncio.to_thread(partial(call, process.pid, f"{INSIDE}:{what}", **arguments))


def _both(what: str, where: str) -> list[EngineFault]:
    return [EngineFault("prefill engine", what, where), EngineFault("decode engine", what, where)]


_NIXL = "vllm.distributed.kv_transfer.kv_connector.v1.nixl"
_LEASE = "app.engines.plugins.nixl_lease"
VLLM = (
    *_both("step", "vllm.v1.core.sched.scheduler:Scheduler.schedule"),
    *_both("model", "vllm.v1.worker.gpu_model_runner:GPUModelRunner.execute_model"),
    *_both("connector", f"{_NIXL}.base_scheduler:NixlBaseConnectorScheduler.build_connector_meta"),
    *_both("input thread", "process_input_sockets"),
    *_both("output thread", "process_output_sockets"),
    EngineFault("prefill engine", "handshake thread", "nixl_handshake_listener"),
    EngineFault(
        "prefill engine", "lease plug-in", f"{_NIXL}.pull_scheduler:NixlPullConnectorScheduler.request_finished"
    ),
    EngineFault("decode engine", "read of KV", f"{_NIXL}.pull_worker:NixlPullConnectorWorker._read_blocks_for_req"),
    EngineFault("decode engine", "lease plug-in", f"{_LEASE}:Leases.judge"),
    EngineFault("decode engine", "question for the clock", f"{_LEASE}:PeerClock._timed_ask", then="goes on"),
    EngineFault("decode engine", "new request", "vllm.v1.request:Request.__init__", then="goes on"),
)
_PD = "sglang.srt.disaggregation"
SGLANG = (
    *_both("step", "sglang.srt.managers.scheduler:Scheduler.run_batch"),
    EngineFault(
        "prefill engine",
        "inflight queue",
        f"{_PD}.prefill:SchedulerDisaggregationPrefillMixin.process_disagg_prefill_inflight_queue",
    ),
    EngineFault(
        "decode engine", "queue of handoffs", f"{_PD}.decode:SchedulerDisaggregationDecodeMixin.process_decode_queue"
    ),
    EngineFault("prefill engine", "transfer thread", "transfer_worker", then="goes on"),  # it catches everything
    EngineFault("prefill engine", "bootstrap thread", "bootstrap_thread"),
    EngineFault("decode engine", "heartbeat thread", "HeartbeatChecker"),
    *_both("pause while idle", "sglang.srt.managers.scheduler:Scheduler.on_idle"),
)


def engine_faults(engine: str) -> tuple[EngineFault, ...]:
    """Return all kinds for an application on `engine`; simulated engines have no processes of their own."""
    return {"vllm": VLLM, "sglang": SGLANG}.get(engine, ())
