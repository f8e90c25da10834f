"""What the campaign does inside the application's processes, in the thread of agent/sitecustomize.py."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from app import background
from app.messages import TransferDescriptor

T = TypeVar("T")

REPLY_TIMEOUT_S = 5.0
_TIME, _TIME_NS = time.time, time.time_ns


class Thrown(Exception):
    """What the campaign throws into tasks."""


def skew_clock(skew_s: float) -> float:
    """Make Python's wall clock in this process wrong by `skew_s` seconds.  Returns the time that it shows now.

    libfaketime would do so in C++ too, but with its version 0.9.10 each `time.sleep` fails.
    """
    time.time = lambda: _TIME() + skew_s
    time.time_ns = lambda: _TIME_NS() + round(skew_s * 1e9)
    return time.time()


def tasks() -> dict[str, str]:
    """Return the names of the tasks that somebody owns, each with the coroutines in which it waits."""
    return _on_loop(lambda: {task.get_name(): _position(task) for task in _owned()})


def throw(task: str) -> str:
    """Make what the first task whose name begins so waits for raise Thrown there, and return the task's whole name."""
    deadline = time.monotonic() + REPLY_TIMEOUT_S
    while (name := _on_loop(lambda: _throw(task))) is None:  # it does not wait just now
        if time.monotonic() > deadline:
            raise LookupError(f"no task {task} waits for anything")
        time.sleep(0.001)
    return name


def _on_loop(work: Callable[[], T]) -> T:
    """Return what `work` returns on the event loop of the process.  Raises LookupError if there is none."""
    done: list[T] = []
    is_done = threading.Event()

    def run() -> None:
        try:
            done.append(work())
        finally:
            is_done.set()

    owned = _owned()  # done ones may be of a loop that is closed
    if not owned:
        raise LookupError("this process has no tasks of Baton")
    owned[0].get_loop().call_soon_threadsafe(run)
    if not is_done.wait(REPLY_TIMEOUT_S) or not done:
        raise LookupError("the event loop does not answer")
    return done[0]


def _owned() -> list[asyncio.Task[Any]]:
    return sorted((task for task in background._watched if not task.done()), key=lambda task: task.get_name())


def _position(task: asyncio.Task[Any]) -> str:
    names: list[str] = []
    awaited: Any = task.get_coro()
    while (frame := getattr(awaited, "cr_frame", None)) is not None:
        names.append(frame.f_code.co_name)
        awaited = getattr(awaited, "cr_await", None)
    return " ".join(names)


def _throw(prefix: str) -> str | None:
    for task in _owned():
        waiter: Any = task
        while isinstance(waiter, asyncio.Task):
            waiter = waiter._fut_waiter  # type: ignore[attr-defined]
        if task.get_name().startswith(prefix) and waiter is not None and not waiter.done():
            waiter.set_exception(Thrown(f"thrown into {task.get_name()}"))
            return task.get_name()
    return None


class Spoiler:
    """Changes transfer descriptors on their way from prefill, where decode takes them."""

    def __init__(self) -> None:
        self.change: Callable[[TransferDescriptor], Any] | None = None
        self.num_changed = 0
        self._seen: list[TransferDescriptor] = []

    def install(self) -> None:
        from deployments.replica.handoff_rendezvous import HandoffRendezvous

        original = HandoffRendezvous.receive

        async def receive(*arguments: Any) -> Any:
            descriptor = await original(*arguments)
            self._seen = [*self._seen[-999:], descriptor]
            if self.change is None:
                return descriptor
            self.num_changed += 1
            return self.change(descriptor)

        HandoffRendezvous.receive = receive  # type: ignore[assignment,method-assign]

    def earlier(self, descriptor: TransferDescriptor, at_least_s: float) -> TransferDescriptor:
        """Return the latest descriptor of another request that is `at_least_s` older than this one."""
        for seen in reversed(self._seen):
            if seen.request_id != descriptor.request_id and descriptor.ready_at - seen.ready_at >= at_least_s:
                return seen
        return descriptor


_spoiler: Spoiler | None = None


def spoil(change: str) -> None:
    """Change all descriptors that decode takes from now on, in a way that CHANGES names; "" for none."""
    global _spoiler
    if _spoiler is None:
        _spoiler = Spoiler()
        _spoiler.install()
    _spoiler.num_changed = 0
    _spoiler.change = CHANGES[change] if change else None


def num_spoilt() -> int:
    """Return how many descriptors have been changed since the last call of `spoil`."""
    return _spoiler.num_changed if _spoiler is not None else 0


def _with_params(descriptor: TransferDescriptor, **values: Any) -> TransferDescriptor:
    known = {name: value for name, value in values.items() if name in descriptor.params}
    return msgspec.structs.replace(descriptor, params={**descriptor.params, **known})


def _other_blocks(descriptor: TransferDescriptor) -> TransferDescriptor:
    """Blocks of others; the sim engine names all blocks of a prompt by one handle."""
    assert _spoiler is not None
    ids = [[block + 1 for block in group] for group in descriptor.params.get("remote_block_ids") or ()]
    handle = _spoiler.earlier(descriptor, 0.0).params.get("handle")
    return _with_params(descriptor, remote_block_ids=ids, handle=handle)


def _other_engine(descriptor: TransferDescriptor) -> TransferDescriptor:
    other = msgspec.structs.replace(descriptor, replica_id="another")
    return _with_params(other, remote_engine_id="00000000-0000-0000-0000-000000000000")


def _other_address(descriptor: TransferDescriptor) -> TransferDescriptor:
    params = descriptor.params
    return _with_params(descriptor, **{name: params[name] ^ 1 for name in ("port", "remote_port") if name in params})


def _other_token(descriptor: TransferDescriptor) -> TransferDescriptor:
    """The first token, if prefill has sampled it."""
    if (first := descriptor.first_token) is None:
        return msgspec.structs.replace(descriptor, prompt_tokens=descriptor.prompt_tokens - 1)
    other = msgspec.structs.replace(first, token_ids=[first.token_ids[0] ^ 1])
    return msgspec.structs.replace(descriptor, first_token=other)


def _older(descriptor: TransferDescriptor) -> TransferDescriptor:
    assert _spoiler is not None
    return _spoiler.earlier(descriptor, 0.0)


def _expired(descriptor: TransferDescriptor) -> TransferDescriptor:
    assert _spoiler is not None
    return _spoiler.earlier(descriptor, descriptor.lease_s)


def _truncated(descriptor: TransferDescriptor) -> Any:
    content = msgspec.msgpack.encode(descriptor)
    return msgspec.msgpack.decode(content[: len(content) // 2], type=TransferDescriptor)


def _no_descriptor(descriptor: TransferDescriptor) -> Any:
    return msgspec.msgpack.encode(descriptor)


CHANGES: dict[str, Callable[[TransferDescriptor], Any]] = {
    "other blocks": _other_blocks,
    "another engine": _other_engine,
    "another address": _other_address,
    "another token": _other_token,
    "older": _older,
    "expired": _expired,
    "truncated": _truncated,
    "undecoded": _no_descriptor,
}
