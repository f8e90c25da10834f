"""What Baton relies on in SGLang: a program for SGLang's environment, which has no pytest.

Prints a JSON object: for each canary, how it failed, or nothing.
"""

from __future__ import annotations

import inspect
import json
import time
import traceback
from collections.abc import Callable
from threading import Lock
from types import SimpleNamespace
from typing import Any

from app.engines import kv_events, sglang_surface
from app.engines.base import EngineSpec
from app.engines.plugins import cpu_waits
from app.engines.sglang import SglangEngine
from app.upstream import UpstreamChanged, check_protocol

SPEC = EngineSpec(
    role="prefill",
    is_disaggregated=True,
    replica_id="r",
    model_path="",
    device="cpu",
    tensor_parallel_size=1,
    engine_args={},
    transfer_backends=["UCX"],
)


def said_by(check: Callable[[], None]) -> str:
    try:
        check()
    except UpstreamChanged as error:
        return str(error)
    raise AssertionError("nothing was said")


def every_name_is_there() -> None:
    from sglang.srt.entrypoints.engine import Engine

    sglang_surface.check_classes()
    sglang_surface.check_environment(SglangEngine(SPEC)._environment())
    cpu_waits.check_sglang()
    methods = {name: value for name, value in vars(sglang_surface.Engine).items() if inspect.isfunction(value)}
    check_protocol(Engine, type("Methods", (), methods))


def a_name_that_is_gone_is_said() -> None:
    from sglang.srt.managers import load_snapshot

    there = load_snapshot.QueueMetrics
    load_snapshot.QueueMetrics = SimpleNamespace
    try:
        said = said_by(sglang_surface.check_classes)
    finally:
        load_snapshot.QueueMetrics = there
    assert said.startswith(f"sglang {sglang_surface.version()} "), said
    assert "has no prealloc_ready" in said, said


def an_environment_variable_that_sglang_does_not_read_is_said() -> None:
    said = said_by(lambda: sglang_surface.check_environment(["OMP_NUM_THREADS", "SGLANG_OF_OLD"]))
    assert "no environment variable SGLANG_OF_OLD" in said, said


def the_message_of_an_abort_tells_that_a_lease_ran_out() -> None:
    """`has_lease_run_out` can go by a field once an abort has one for this."""
    from sglang.srt.disaggregation.common.conn import CommonKVSender
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    def abort(end: Callable[[Any], object]) -> Any:
        """What SGLang tells of a prefill that `end` ends."""
        failures: dict[int, str] = {}
        manager = SimpleNamespace(
            defer_decode_allocation=False,
            bootstrap_timeout=1,
            record_failure=failures.__setitem__,
            update_status=lambda room, status: None,
            failure_lock=Lock(),
            failure_records=failures,
        )
        sender: Any = SimpleNamespace(
            init_time=time.time() - 5,
            kv_mgr=manager,
            bootstrap_room=7,
            clear=lambda: None,
            trace_ctx=SimpleNamespace(trace_req_finish=lambda: None),
        )
        end(sender)
        try:
            CommonKVSender.failure_exception(sender)
        except Exception as error:  # noqa: BLE001  what it raises is what the message is made of
            return FINISH_ABORT(f"Prefill bootstrap failed with exception {error}", 500).to_json()

    ran_out = abort(CommonKVSender._check_bootstrap_timeout)
    assert sglang_surface.has_lease_run_out(ran_out), ran_out
    assert set(ran_out) == {"type", "message", "status_code", "err_type"}, ran_out
    gone = abort(lambda sender: sender.kv_mgr.record_failure(7, "the decode engine is gone"))
    assert not sglang_surface.has_lease_run_out(gone), gone


def the_message_of_an_abort_tells_that_kv_has_changed() -> None:
    """`has_kv_changed` can go by a field once an abort has one for this."""
    from sglang.srt.disaggregation.decode import SchedulerDisaggregationDecodeMixin

    source = inspect.getsource(SchedulerDisaggregationDecodeMixin._handle_kv_checksum_mismatch)
    assert f'            "{sglang_surface.KV_CHANGED}",\n' in source, source
    assert "disaggregation_enable_kv_checksum" in sglang_surface.argument_names()


def events_have_what_is_read_of_them() -> None:
    from sglang.srt.disaggregation.kv_events import AllBlocksCleared, BlockRemoved, BlockStored

    of_vllm = {"group_idx", "extra_keys"}
    for found, read in [
        (BlockStored, kv_events._Stored),
        (BlockRemoved, kv_events._Removed),
        (AllBlocksCleared, kv_events._Cleared),
    ]:
        missing = set(read.__struct_fields__) - of_vllm - set(found.__struct_fields__)
        assert not missing, (found, missing)
        assert found.__name__ == read.__struct_config__.tag, found


def an_idle_scheduler_looks_once_a_second() -> None:
    """`cpu_waits` replaces ``maybe_sleep``; that can go once SGLang's own wait ends for a transfer, or is short."""
    from sglang.srt.managers.scheduler_components.idle_sleeper import IdleSleeper

    waits: list[float] = []
    poller = SimpleNamespace(poll=waits.append)
    sleeper: Any = SimpleNamespace(poller=poller, empty_cache_interval=0)
    IdleSleeper.maybe_sleep(sleeper)
    cpu_waits._sleep_until_message(sleeper)
    assert waits == [1000, cpu_waits.IDLE_POLL_S * 1000], waits


def a_scheduler_that_waits_for_a_transfer_spins() -> None:
    """`cpu_waits` pauses after ``on_idle``; that can go once it waits by itself while it is not fully idle."""
    from sglang.srt.managers.scheduler import Scheduler

    source = inspect.getsource(Scheduler.on_idle)
    not_idle = source.partition("if not fully_idle:")[2].partition("record_scheduler_idle")[0]
    assert "time.sleep(0)" in not_idle, source
    assert "maybe_sleep" not in not_idle, source


def the_hooks_hit_their_targets() -> None:
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.managers.scheduler_components.idle_sleeper import IdleSleeper
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(cpu_waits.ON_IDLE, cpu_waits._pause_after, HookType.AFTER)
    HookRegistry.register(cpu_waits.MAYBE_SLEEP, cpu_waits._sleep_until_message, HookType.REPLACE)
    HookRegistry.apply_hooks()
    for method in (Scheduler.on_idle, IdleSleeper.maybe_sleep):
        assert hasattr(method, "__wrapped__"), method
    waits: list[float] = []
    sleeper: Any = SimpleNamespace(poller=SimpleNamespace(poll=waits.append))
    IdleSleeper.maybe_sleep(sleeper)
    assert waits == [cpu_waits.IDLE_POLL_S * 1000], waits


CANARIES: list[Callable[[], None]] = [
    every_name_is_there,
    a_name_that_is_gone_is_said,
    an_environment_variable_that_sglang_does_not_read_is_said,
    the_message_of_an_abort_tells_that_a_lease_ran_out,
    the_message_of_an_abort_tells_that_kv_has_changed,
    events_have_what_is_read_of_them,
    an_idle_scheduler_looks_once_a_second,
    a_scheduler_that_waits_for_a_transfer_spins,
    the_hooks_hit_their_targets,  # last: it leaves them there
]


def main() -> None:
    failures: dict[str, str] = {}
    for canary in CANARIES:
        try:
            canary()
            failures[canary.__name__] = ""
        except Exception:  # noqa: BLE001  the test that reads this shows it
            failures[canary.__name__] = traceback.format_exc()
    print(json.dumps(failures))


if __name__ == "__main__":
    main()
