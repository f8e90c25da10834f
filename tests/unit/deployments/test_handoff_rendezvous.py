"""A sequence and its reference meet in whatever order things happen, and the KV is pulled or released exactly once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Generator
from itertools import count, permutations
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import EngineFailed
from app.messages import TransferDescriptor
from deployments.replica.handoff_rendezvous import REMEMBER_S, DescriptorExpired, HandoffRendezvous

TIMEOUT_S = 10.0
TURNS = 10
"""Of the event loop: enough for everything to come to rest."""
OUTCOMES = ("succeeds", "expires", "fails")
EVENTS = ("submit", "attach", "attach again", "cancel", "close", "prefill ends", "timeout")


class Reference:
    """To the descriptor of a prefill, as often as one likes."""

    def __init__(self, prefill: asyncio.Future[TransferDescriptor]) -> None:
        self._prefill = prefill

    def __await__(self) -> Generator[Any, None, TransferDescriptor]:
        return asyncio.shield(self._prefill).__await__()


class Sequence:
    """One sequence with a handoff, from the events of both sides to what became of its KV."""

    def __init__(self, replica: Replica, number: int, outcome: str) -> None:
        self._replica = replica
        self._number = number
        self._outcome = outcome
        self._prefill: asyncio.Future[TransferDescriptor] = asyncio.get_running_loop().create_future()
        self._task: asyncio.Task[None] | None = None
        self.is_attached = False
        self.num_generated = 0

    def do(self, event: str) -> None:
        if event == "submit" and not self._replica.is_closed:
            self._task = asyncio.create_task(self._run())
        elif event == "cancel" and self._task is not None:
            asyncio.get_running_loop().call_soon(self._task.cancel)  # as a Link does it
        elif event == "attach" or (event == "attach again" and self.is_attached):
            self.is_attached = True
            self._replica.rendezvous.attach("channel", self._number, Reference(self._prefill))
        elif event == "prefill ends":
            self.end_prefill()

    def end_prefill(self) -> None:
        if self._prefill.done():
            return
        if self._outcome == "fails":
            self._prefill.set_exception(EngineFailed("no"))
            self._prefill.exception()  # whether anybody looks is not the matter here
        else:
            self._prefill.set_result(descriptor(self._number, lease_s=30.0 if self._outcome == "succeeds" else -1.0))

    async def _run(self) -> None:
        try:
            await self._replica.rendezvous.receive("channel", self._number, TIMEOUT_S)
        except (TimeoutError, DescriptorExpired, EngineFailed):
            return
        self.num_generated += 1  # the engine has it from here on

    def check(self) -> None:
        has_kv = self.is_attached and self._outcome != "fails"
        assert self.num_generated + self._replica.released.count(self._number) == has_kv
        assert not (self.num_generated and self._outcome == "expires")


class Replica:
    """A decode replica's rendezvous and the one channel that it has, in a time of its own."""

    def __init__(self) -> None:
        self.released: list[int] = []
        self.rendezvous = HandoffRendezvous(self._release)
        self.rendezvous.open("channel")
        self.is_closed = False
        self._passed_s = 0.0
        asyncio.get_running_loop().time = lambda: self._passed_s  # type: ignore[method-assign]

    async def _release(self, released: TransferDescriptor) -> None:
        self.released.append(released.prompt_tokens)

    def close(self, sequences: list[Sequence]) -> None:
        if self.is_closed:
            return
        self.is_closed = True
        for sequence in sequences:
            sequence.do("cancel")
        asyncio.get_running_loop().call_soon(self.rendezvous.close, "channel")

    async def wait(self, seconds: float = 0.0, turns: int = TURNS) -> None:
        self._passed_s += seconds
        for _ in range(turns):
            await asyncio.sleep(0)


def descriptor(number: int, *, lease_s: float = 30.0, clock_ahead_s: float = 0.0) -> TransferDescriptor:
    """Of KV that has just become ready on a node whose clock is that far ahead."""
    return TransferDescriptor(
        request_id=str(number),
        engine="e",
        replica_id="p",
        prompt_tokens=number,
        cached_tokens=0,
        ready_at=time.time() + clock_ahead_s,
        lease_s=lease_s,
        params={},
    )


Step = tuple[int, str, int]
"""Which sequence, what happens to it, and how many turns of the event loop pass before the next step."""


async def drive(steps: list[Step], outcomes: tuple[str, ...]) -> None:
    """Let it all happen in this order; then everything ends, as it does sooner or later."""
    replica = Replica()
    sequences = [Sequence(replica, number, outcome) for number, outcome in enumerate(outcomes)]
    for number, event, turns in steps:
        if event == "close":
            replica.close(sequences)
        elif event == "timeout":
            await replica.wait(TIMEOUT_S, turns=0)
        else:
            sequences[number].do(event)
        await replica.wait(turns=turns)
    for sequence in sequences:
        sequence.end_prefill()
    await replica.wait()
    replica.close(sequences)
    await replica.wait()
    for sequence in sequences:
        sequence.check()
    await replica.wait(REMEMBER_S + 1)
    assert not replica.rendezvous._channels
    assert not replica.rendezvous._releasing


def is_possible(order: tuple[str, ...]) -> bool:
    return order.index("submit") < order.index("cancel") and order.index("attach") < order.index("attach again")


@pytest.mark.parametrize("turns", [0, 1, TURNS], ids=["at once", "turn by turn", "at rest"])
@pytest.mark.parametrize("outcome", OUTCOMES)
def test_in_every_order_the_kv_is_pulled_or_released_exactly_once(outcome: str, turns: int) -> None:
    for order in filter(is_possible, permutations(EVENTS)):
        try:
            asyncio.run(drive([(0, event, turns) for event in order], (outcome,)))
        except BaseException as error:
            error.add_note(f"in the order {order}")
            raise


@given(
    st.lists(st.tuples(st.integers(0, 2), st.sampled_from(EVENTS), st.integers(0, 3)), max_size=16),
    st.tuples(*[st.sampled_from(OUTCOMES)] * 3),
)
def test_so_it_is_with_several_sequences_and_whatever_is_left_out(steps: list[Step], outcomes: tuple[str, ...]) -> None:
    once: dict[tuple[int, str], Step] = {}
    for number, event, turns in steps:
        once.setdefault((number, event), (number, event, turns))
    in_turn = count()  # as a frontend numbers what it submits
    ordered = [(next(in_turn) if event == "submit" else number, event, turns) for number, event, turns in once.values()]
    asyncio.run(drive(ordered, outcomes))


# What the sequence is told


async def received(*before: str, outcome: str = "succeeds", after: tuple[str, ...] = ()) -> tuple[Any, list[int]]:
    """What `receive` returns or raises with some events before it and some after, and what is released."""
    replica = Replica()
    sequence = Sequence(replica, 0, outcome)
    for event in before:
        sequence.do(event)
    task = asyncio.create_task(replica.rendezvous.receive("channel", 0, TIMEOUT_S))
    await replica.wait()
    for event in after:
        await replica.wait(TIMEOUT_S) if event == "timeout" else sequence.do(event)
        await replica.wait()
    return (await asyncio.gather(task, return_exceptions=True))[0], replica.released


@pytest.mark.parametrize("num_before", [0, 1, 2], ids=["sequence", "reference", "descriptor"])
def test_the_descriptor_comes_whichever_is_there_first(num_before: int) -> None:
    events = ("attach", "prefill ends")
    result, released = asyncio.run(received(*events[:num_before], after=events[num_before:]))
    assert result.prompt_tokens == 0
    assert released == []


@pytest.mark.parametrize(
    ("after", "outcome", "error"),
    [
        (("timeout",), "succeeds", TimeoutError),
        (("attach", "timeout"), "succeeds", TimeoutError),
        (("attach", "prefill ends"), "expires", DescriptorExpired),
        (("attach", "prefill ends"), "fails", EngineFailed),
    ],
    ids=["no reference", "no descriptor", "too late", "failed"],
)
def test_a_sequence_is_told_why_there_is_no_descriptor(after: tuple[str, ...], outcome: str, error: type) -> None:
    result, released = asyncio.run(received(outcome=outcome, after=after))
    assert type(result) is error
    assert released == ([0] if outcome == "expires" else [])


async def received_after(wait_s: float, descriptor: TransferDescriptor) -> Any:
    """What `receive` returns or raises if the descriptor comes after that time."""
    replica = Replica()
    prefill: asyncio.Future[TransferDescriptor] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(replica.rendezvous.receive("channel", 0, timeout_s=60.0))
    replica.rendezvous.attach("channel", 0, Reference(prefill))
    await replica.wait()
    await replica.wait(wait_s)
    prefill.set_result(descriptor)
    return (await asyncio.gather(task, return_exceptions=True))[0]


@pytest.mark.parametrize("clock_ahead_s", [-3600.0, -60.0, -15.1, 0.0, 15.1, 60.0, 3600.0])
def test_the_clock_of_the_other_node_does_not_matter(clock_ahead_s: float) -> None:
    fresh = descriptor(0, clock_ahead_s=clock_ahead_s)
    assert asyncio.run(received_after(1.0, fresh)) == fresh
    assert type(asyncio.run(received_after(15.1, fresh))) is DescriptorExpired


def test_the_time_in_which_the_prompt_was_computed_is_none_of_the_lease() -> None:
    slow = msgspec.structs.replace(descriptor(0), prefill_s=40.0)
    assert asyncio.run(received_after(41.0, slow)) == slow
    assert type(asyncio.run(received_after(55.1, slow))) is DescriptorExpired


def test_a_reference_to_a_channel_that_nobody_remembers_is_released() -> None:
    async def attach() -> list[int]:
        replica = Replica()
        replica.rendezvous.attach("another", 0, Reference(prefill := asyncio.get_running_loop().create_future()))
        prefill.set_result(descriptor(0))
        await replica.wait()
        return replica.released

    assert asyncio.run(attach()) == [0]
