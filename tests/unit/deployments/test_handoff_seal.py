"""A transfer descriptor that has changed, or that is another prompt's, is neither used nor followed to free KV."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.handoff_seal import damage, misplacement, pack, seal, unpack
from app.messages import GenerateRequest, KvFormat, TokenDelta, TransferDescriptor
from deployments.replica.decode import DecodeHalf

FORMAT = KvFormat(
    protocol=2, engine="e", engine_version="1", model="m", settings={}, block_size_tokens=16, tensor_parallel_size=1
)
REQUEST = GenerateRequest(request_id="r", prompt_token_ids=[5, 6, 7], sampling={}, cache_salt="s")
SEALED = seal(
    TransferDescriptor(
        engine="e",
        replica_id="p",
        request_id="r",
        prompt_tokens=3,
        cached_tokens=0,
        ready_at=1.0,
        lease_s=30.0,
        params={"remote_block_ids": [[1, 2]], "remote_port": 5600},
        first_token=TokenDelta([9]),
        kv_format=FORMAT,
    ),
    REQUEST,
)


def with_params(**params: Any) -> TransferDescriptor:
    return msgspec.structs.replace(SEALED, params={**SEALED.params, **params})


CHANGED = {
    "other blocks": with_params(remote_block_ids=[[1, 3]]),
    "another port": with_params(remote_port=5601),
    "another replica": msgspec.structs.replace(SEALED, replica_id="q"),
    "a longer lease": msgspec.structs.replace(SEALED, lease_s=300.0),
    "another first token": msgspec.structs.replace(SEALED, first_token=TokenDelta([8])),
    "another prompt's digest": msgspec.structs.replace(SEALED, prompt_digest=b"x"),
    "no seal": msgspec.structs.replace(SEALED, seal=b""),
}
MISPLACED = {
    "of another prompt": msgspec.structs.replace(REQUEST, prompt_token_ids=[5, 6, 8]),
    "of another salt": msgspec.structs.replace(REQUEST, cache_salt="t"),
    "of another request": msgspec.structs.replace(REQUEST, request_id="q"),
    "of a request with a longer name": msgspec.structs.replace(REQUEST, request_id="rr"),
}


def test_what_prefill_sealed_is_taken_whatever_time_its_hops_took() -> None:
    timed = msgspec.structs.replace(SEALED, phases={"prefill": 1.0})
    assert damage(timed) == misplacement(timed, REQUEST) == ""


def test_a_packed_descriptor_is_the_same_and_anything_else_is_noticed() -> None:
    assert unpack(pack(SEALED)) == SEALED
    assert not damage(unpack(pack(SEALED)))
    for message in (pack(SEALED)[:-9], b"", b"\x80\x05what?", None):
        assert unpack(message) == message
        assert "no transfer descriptor came" in damage(unpack(message))


def test_a_later_attempt_and_the_control_run_of_another_prompt_are_no_mistakes() -> None:
    again = msgspec.structs.replace(REQUEST, request_id="r-1")
    retried = seal(msgspec.structs.replace(SEALED, request_id="r-1"), again)
    assert damage(retried) == misplacement(retried, REQUEST) == ""
    control = msgspec.structs.replace(REQUEST, prefill_mode="corrupted")
    prefilled = msgspec.structs.replace(control, prompt_token_ids=[6, 7, 5])
    assert misplacement(seal(SEALED, prefilled), control) == ""


@pytest.mark.parametrize("name", CHANGED)
def test_a_changed_descriptor_is_noticed(name: str) -> None:
    assert "has changed" in damage(CHANGED[name])


@pytest.mark.parametrize("name", MISPLACED)
def test_a_descriptor_of_another_request_is_noticed(name: str) -> None:
    assert damage(SEALED) == ""
    assert "another request or prompt" in misplacement(SEALED, MISPLACED[name])


@given(st.integers(min_value=0), st.integers(1, 255))
def test_no_changed_byte_makes_another_descriptor_that_is_taken(place: int, change: int) -> None:
    content = bytearray(msgspec.msgpack.encode(SEALED))
    content[place % len(content)] ^= change
    try:
        told = msgspec.msgpack.decode(bytes(content), type=TransferDescriptor)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return
    assert told == SEALED or damage(told)


class Replica:
    """A decode replica to which one thing comes as the descriptor."""

    def __init__(self, came: Any) -> None:
        self.came = came
        self.released: list[TransferDescriptor] = []
        self.worker: Any = SimpleNamespace(
            _handoffs=SimpleNamespace(receive=self._receive),
            _config=SimpleNamespace(limits=SimpleNamespace(prefill_timeout_s=1)),
            _links=None,
            _engine=SimpleNamespace(release=self._release),
            _info=SimpleNamespace(engine="e"),
            kv_format=FORMAT,
        )
        release: Any = DecodeHalf._release
        self.worker._release = partial(release, self.worker)

    async def _receive(self, *_: object) -> Any:
        return self.came

    async def _release(self, _: str, descriptor: TransferDescriptor) -> None:
        self.released.append(descriptor)

    async def receive(self, request: GenerateRequest) -> tuple[TransferDescriptor | None, str]:
        channel: Any = SimpleNamespace(id="c")
        return await DecodeHalf._receive(self.worker, channel, 0, request)


async def test_decode_computes_the_prompt_itself_and_frees_nobodys_kv() -> None:
    for came in (*CHANGED.values(), b"\x93\x01", None):
        replica = Replica(came)
        assert await replica.receive(REQUEST) == (None, "descriptor_corrupted")
        await replica.worker._release(came)
        assert replica.released == []
    for request in MISPLACED.values():
        replica = Replica(SEALED)
        assert await replica.receive(request) == (None, "descriptor_corrupted")
        assert replica.released == []
    replica = Replica(SEALED)
    assert await replica.receive(REQUEST) == (SEALED, "")
    await replica.worker._release(SEALED)
    assert replica.released == [SEALED]
