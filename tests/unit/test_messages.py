"""The messages survive the two encodings that they cross deployments in: msgpack and pickle."""

import math
import pickle

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.messages import GenerateRequest, Logprobs, PrefillReport, TokenDelta, TransferDescriptor, merge_deltas

counts = st.integers(0, 2**40)
token_ids = st.integers(0, 2**31)
words = st.text(max_size=20)
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=8,
)
logprobs = st.builds(
    Logprobs,
    st.lists(st.lists(token_ids, max_size=3), max_size=3),
    st.lists(st.lists(st.floats(max_value=0), max_size=3), max_size=3),
    st.lists(counts, max_size=3),
)
reports = st.builds(
    PrefillReport,
    st.sampled_from(["remote", "local"]),
    words,
    st.none() | words,
    words,
    counts,
    st.none() | counts,
    words,
    phases=st.dictionaries(st.sampled_from(["prefill", "delivery"]), st.floats(0, 100)),
)
deltas = st.builds(
    TokenDelta,
    st.lists(token_ids, max_size=5),
    st.sampled_from([None, "stop", "length", "abort", "repetition"]),
    st.none() | token_ids | words,
    st.none() | logprobs,
    st.none() | logprobs,
    st.none() | reports,
)
descriptors = st.builds(
    TransferDescriptor,
    engine=words,
    replica_id=words,
    prompt_tokens=counts,
    cached_tokens=counts,
    ready_at=st.floats(0, 1e10),
    lease_s=st.floats(0, 1e4),
    params=st.dictionaries(words, plain, max_size=4),
    first_token=st.none() | deltas,
)
requests = st.builds(
    GenerateRequest,
    request_id=words,
    prompt_token_ids=st.lists(token_ids, max_size=5),
    sampling=st.dictionaries(words, plain, max_size=4),
    cache_salt=st.none() | words,
    priority=st.integers(-100, 100),
    prefill_mode=st.sampled_from(["auto", "local", "corrupted"]),
    reasoning_ended=st.none() | st.booleans(),
    reasoning_parser_kwargs=st.none() | st.dictionaries(words, plain, max_size=2),
)
descriptor = TransferDescriptor(
    engine="vllm",
    replica_id="p",
    request_id="r",
    prompt_tokens=3,
    cached_tokens=0,
    ready_at=1000.0,
    lease_s=30.0,
    params={},
)


@given(deltas)
@settings(max_examples=50)
def test_a_delta_survives_msgpack(delta: TokenDelta) -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(delta), type=TokenDelta) == delta


@given(requests)
@settings(max_examples=50)
def test_a_request_survives_msgpack(request: GenerateRequest) -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(request), type=GenerateRequest) == request


def test_keys_that_are_numbers_survive_msgpack() -> None:
    request = GenerateRequest(request_id="r", prompt_token_ids=[1], sampling={"logit_bias": {5: -100.0}})
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(request), type=GenerateRequest) == request


def test_two_deltas_become_what_both_say() -> None:
    report = PrefillReport("local", "aggregated", None, "d", 0, 0, "")
    first = TokenDelta([1, 2], logprobs=Logprobs([[1], [2]], [[-0.1], [-0.2]], [1, 2]), report=report)
    last = TokenDelta([3], "stop", 3, logprobs=Logprobs([[3]], [[-0.3]], [3]))
    assert merge_deltas(first, last) == TokenDelta(
        [1, 2, 3], "stop", 3, Logprobs([[1], [2], [3]], [[-0.1], [-0.2], [-0.3]], [1, 2, 3]), None, report
    )


@given(descriptors)
def test_a_transfer_descriptor_survives_pickling(descriptor: TransferDescriptor) -> None:
    assert pickle.loads(pickle.dumps(descriptor)) == descriptor


@given(requests)
def test_a_request_survives_pickling(request: GenerateRequest) -> None:
    assert pickle.loads(pickle.dumps(request)) == request


@pytest.mark.parametrize(
    ("waited_s", "prefill_s", "expired"),
    [
        (0.0, None, False),
        (15.0, None, False),
        (math.nextafter(15.0, math.inf), None, True),
        (30.0, None, True),
        (30.0, 20.0, False),  # most of the time the KV was not there yet
        (36.0, 20.0, True),
        (1.0, 20.0, False),  # decode got the sequence late
    ],
)
def test_a_descriptor_expires_after_half_its_lease(waited_s: float, prefill_s: float | None, expired: bool) -> None:
    assert msgspec.structs.replace(descriptor, prefill_s=prefill_s).has_expired(waited_s) is expired
