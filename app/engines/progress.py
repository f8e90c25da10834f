"""Notices an engine that hangs: its processes are there, but it makes no step any more.

1. Each step that an adapter hears of is progress.  If it has heard of none for a while, it asks the engine something
   that the engine answers between two steps.  An engine that only waits, for requests or for KV from elsewhere, answers
   at once; one that computes answers when its step is done.
2. How long the answer may take follows the engine's own: PATIENCE times the longest that it has taken lately, within
   bounds.  For an engine whose processes do nothing meanwhile, or of which a signal has stopped one, they are narrow,
   and only such time counts.  For one that uses the CPU, or waits for it, they are wide: it may compute a long prompt,
   compile what it runs for the first time, or capture a graph.  So they are for one on a GPU, whose processes may sleep
   while it computes.
3. Time in which this process did not run itself counts for nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Protocol

from app.errors import EngineDead

REST_S = 1.0
"""After how long without a step the engine is asked, and the time between two questions to an idle one."""
POLL_S = 0.2
LOOK_S = 1.0
"""How often an awaited answer is asked after, and how often the processes are then looked at, which costs more."""
PATIENCE = 5.0
"""How many times the longest of the last answers one more may take."""
MEMORY_S = 300.0
"""How long an answer is remembered."""
IDLE_FLOOR_S, IDLE_CEILING_S = 5.0, 60.0
"""The bounds for an engine that does nothing.  Below the floor are what loading a kernel from a disk takes, and a
checkpoint of the host.  The ceiling is what clients wait for a first token before they give up
(``limits.prefill_timeout_s``)."""
WORKING_FLOOR_S, WORKING_CEILING_S = 60.0, 300.0
"""The bounds for an engine that works.  What is compiled at first use may take up to a minute (17 s for vLLM's log
probabilities on a CPU).  The ceiling is the engines' own for one step (``VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS`` of vLLM,
``watchdog_timeout`` of SGLang)."""
NUM_FIRST_STEPS = 1000
"""An engine that works has as long as the ceiling for each of so many steps: most of what it ever compiles is compiled
in them, which takes minutes for some models (DeepGEMM's kernels)."""
WORKING_SHARE = 0.1
"""Of one core: the least that an engine uses which computes or compiles.  Threads that only poll use some 0.01."""


class Processes(Protocol):
    """`app.engines.processes.EngineProcesses`, or what stands in for it."""

    def look(self) -> None: ...

    def stopped(self) -> list[int]: ...

    def cpu_s(self) -> float: ...


class ProgressWatch:
    """Watches one engine."""

    def __init__(
        self,
        ask: Callable[[], Awaitable[object]],
        processes: Processes,
        has_work: Callable[[], bool] = lambda: True,
        *,
        is_on_gpu: bool = False,
    ) -> None:
        """`ask` returns when the engine has answered.  It is called only while `has_work`.

        The processes of an engine that `is_on_gpu` count as working unless one is stopped.
        """
        self._ask = ask
        self._processes = processes
        self._has_work = has_work
        self._is_on_gpu = is_on_gpu
        self._num_steps = 0
        self._answers: deque[_Silence] = deque()

    def on_step(self) -> None:
        """Take note that the engine has made a step."""
        self._num_steps += 1

    async def run(self) -> None:
        """Watch until the engine hangs.  Raises EngineDead then, and what `ask` raises."""
        while True:
            before = self._num_steps
            await asyncio.sleep(REST_S)
            if self._has_work() and (self._num_steps == before or self._processes.stopped()):
                await self._wait_for_answer()

    async def _wait_for_answer(self) -> None:
        """Wait until the engine has answered, and none of its processes is stopped.  Raises EngineDead."""
        answer = asyncio.ensure_future(self._ask())
        try:
            silence = _Silence(self._processes, self._is_on_gpu)
            num_steps = self._num_steps
            while not answer.done() or (self._has_work() and self._processes.stopped()):
                await (asyncio.sleep(POLL_S) if answer.done() else asyncio.wait([answer], timeout=POLL_S))
                silence.go_on()
                if self._num_steps != num_steps:
                    num_steps, silence = self._num_steps, _Silence(self._processes, self._is_on_gpu)
                self._check(silence)
            await answer
            self._answers.append(silence)
        finally:
            answer.cancel()

    def _check(self, silence: _Silence) -> None:
        while self._answers and self._answers[0].until < time.monotonic() - MEMORY_S:
            self._answers.popleft()
        longest_s = max((answer.seconds for answer in self._answers), default=0.0)
        longest_idle_s = max((answer.longest_idle_s for answer in self._answers), default=0.0)
        if silence.idle_s > min(IDLE_CEILING_S, max(IDLE_FLOOR_S, PATIENCE * longest_idle_s)):
            stopped = self._processes.stopped()
            how = f"processes {stopped} are stopped" if stopped else "its processes do nothing"
            raise EngineDead(f"the engine hangs: it made no step for {silence.seconds:.1f} s, and {how}")
        floor_s = WORKING_FLOOR_S if self._num_steps >= NUM_FIRST_STEPS else WORKING_CEILING_S
        if silence.seconds > min(WORKING_CEILING_S, max(floor_s, PATIENCE * longest_s)):
            raise EngineDead(f"the engine hangs: it made no step for {silence.seconds:.1f} s")


class _Silence:
    """How long an engine has given no sign of life."""

    def __init__(self, processes: Processes, is_on_gpu: bool) -> None:
        self.seconds = 0.0
        self.idle_s = 0.0
        """Since its processes were last seen to work."""
        self.longest_idle_s = 0.0
        self.until = time.monotonic()
        self._processes = processes
        self._is_on_gpu = is_on_gpu
        self._looked_at_s = 0.0
        self._cpu_s = processes.cpu_s()

    def go_on(self) -> None:
        """Count the time since the last call, but not that in which this process did not run."""
        now = time.monotonic()
        passed_s = min(now - self.until, 2 * POLL_S)
        self.until = now
        self.seconds += passed_s
        self.idle_s += passed_s
        self.longest_idle_s = max(self.longest_idle_s, self.idle_s)
        if self.seconds - self._looked_at_s >= LOOK_S and self._is_working():
            self.idle_s = 0.0

    def _is_working(self) -> bool:
        """Return whether the engine's processes have used the CPU since the last look, or may have used a GPU."""
        self._processes.look()
        before, self._cpu_s = self._cpu_s, self._processes.cpu_s()
        passed_s, self._looked_at_s = self.seconds - self._looked_at_s, self.seconds
        has_worked = self._is_on_gpu or self._cpu_s - before >= WORKING_SHARE * passed_s
        return has_worked and not self._processes.stopped()
