"""A vLLM decode engine computes a prompt itself if it read the KV after prefill's lease, or if that has changed.

The engines are real, and move KV by NIXL.  There is no Ray: a test has to stop decode between two of its steps.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import pytest

from app.engines.plugins.nixl_checksum import CHECKSUMS
from app.messages import GenerateRequest, TokenDelta, TransferDescriptor
from tests.engines.corruption import Damage
from tests.engines.engine_process import LEASE_S, EngineProcess

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

PROMPT_TOKENS = 1024
OUTPUT_TOKENS = 24


def request(name: str, seed: int, **sampling: Any) -> GenerateRequest:
    prompt = random.Random(seed).choices(range(300, 2000), k=PROMPT_TOKENS)
    sampling = {"temperature": 0.0, "max_tokens": OUTPUT_TOKENS, "ignore_eos": True, **sampling}
    # Each request has a salt of its own, so that nothing is found in decode's prefix cache.
    return GenerateRequest(request_id=name, prompt_token_ids=prompt, sampling=sampling, cache_salt=name)


def tokens(deltas: list[TokenDelta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


def last_report(deltas: list[TokenDelta]) -> Any:
    return [delta.report for delta in deltas if delta.report is not None][-1]


def test_kv_that_is_read_in_time_is_used(prefill: EngineProcess, decode: EngineProcess) -> None:
    undisturbed = decode.generate(request("local", 1), None)
    deltas = decode.generate(request("remote", 1), prefill.prefill(request("remote", 1)))
    assert tokens(deltas) == tokens(undisturbed)
    assert last_report(deltas).transferred_tokens == PROMPT_TOKENS


def test_kv_that_is_read_after_the_lease_is_computed_anew(prefill: EngineProcess, decode: EngineProcess) -> None:
    """Decode stands still from before it reads until prefill has used the blocks for other prompts."""
    undisturbed = decode.generate(request("undisturbed", 2), None)
    decode.generate(request("connect", 3), prefill.prefill(request("connect", 3)))
    expired = prefill.call("stats").num_expired_handoffs
    descriptor = prefill.prefill(request("late", 2))
    stopped = decode.engine_processes()
    assert stopped
    for process in stopped:
        process.suspend()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(decode.generate, request("late", 2), descriptor)
        try:
            began = time.monotonic()
            seeds = iter(range(1000, 9999))
            while prefill.call("stats").num_expired_handoffs == expired:
                assert time.monotonic() - began < 3 * LEASE_S
                prefill.generate(request(f"busy-{(seed := next(seeds))}", seed, max_tokens=1), None)
            for seed in range(4):
                prefill.generate(request(f"after-{seed}", 100 + seed, max_tokens=1), None)
        finally:
            for process in stopped:
                process.resume()
        deltas = answer.result(timeout=60)
    assert tokens(deltas) == tokens(undisturbed)
    assert last_report(deltas).reason == "descriptor_expired"
    assert decode.call("stats").num_expired_handoffs == 1


def test_a_decode_engine_that_stood_still_goes_on_using_kv(prefill: EngineProcess, decode: EngineProcess) -> None:
    undisturbed = decode.generate(request("undisturbed-after", 4), None)
    deltas = decode.generate(request("after", 4), prefill.prefill(request("after", 4)))
    assert tokens(deltas) == tokens(undisturbed)
    assert last_report(deltas).transferred_tokens == PROMPT_TOKENS


def counts(decode: EngineProcess) -> tuple[int, int, int]:
    """How much KV matched, did not match, and was not compared."""
    stats = decode.call("stats")
    return stats.num_checksum_matches, stats.num_checksum_mismatches, stats.num_checksums_skipped


def spoil_next_read(decode: EngineProcess, damage: Damage) -> None:
    decode.call("_core.collective_rpc_async", "spoil_next_read", None, (damage,))


def with_checksums(descriptor: TransferDescriptor, change: Callable[[Any], Any]) -> TransferDescriptor:
    params = {**descriptor.params, CHECKSUMS: change(descriptor.params[CHECKSUMS])}
    return msgspec.structs.replace(descriptor, params=params)


@pytest.mark.parametrize("damage", ["bit", "stale"])
def test_kv_that_has_changed_on_the_way_is_computed_anew(
    prefill: EngineProcess, decode: EngineProcess, damage: Damage
) -> None:
    name = f"changed-{damage}"
    undisturbed = decode.generate(request(f"{name}-local", 5), None)
    matches, mismatches, skipped = counts(decode)
    descriptor = prefill.prefill(request(name, 5))
    spoil_next_read(decode, damage)
    deltas = decode.generate(request(name, 5), descriptor)
    assert tokens(deltas) == tokens(undisturbed)
    assert last_report(deltas).reason == "kv_changed"
    assert counts(decode) == (matches, mismatches + 1, skipped)


def test_without_a_checksum_changed_kv_gives_another_answer(prefill: EngineProcess, decode: EngineProcess) -> None:
    """So the tests above can fail."""
    undisturbed = decode.generate(request("unseen-local", 5), None)
    before = counts(decode)
    descriptor = prefill.prefill(request("unseen", 5))
    params = {name: value for name, value in descriptor.params.items() if name != CHECKSUMS}
    spoil_next_read(decode, "stale")
    deltas = decode.generate(request("unseen", 5), msgspec.structs.replace(descriptor, params=params))
    assert tokens(deltas) != tokens(undisturbed)
    assert last_report(deltas).transferred_tokens == PROMPT_TOKENS
    assert counts(decode) == before


@pytest.mark.parametrize("num_cached", [0, 512])
def test_kv_that_is_right_matches_also_where_decode_has_the_beginning(
    prefill: EngineProcess, decode: EngineProcess, num_cached: int
) -> None:
    salt = f"cached-{num_cached}"
    whole = msgspec.structs.replace(request(f"{salt}-whole", 6), cache_salt=salt)
    beginning = msgspec.structs.replace(whole, request_id=salt, prompt_token_ids=whole.prompt_token_ids[:num_cached])
    if num_cached:
        decode.generate(beginning, None)
    matches, mismatches, skipped = counts(decode)
    deltas = decode.generate(whole, prefill.prefill(whole))
    assert last_report(deltas).transferred_tokens == PROMPT_TOKENS - num_cached
    assert counts(decode) == (matches + 1, mismatches, skipped)


@pytest.mark.parametrize(
    ("why", "change"),
    [
        ("no sums", lambda ranks: []),
        ("another layout", lambda ranks: [["of another kind", sums] for _, sums in ranks]),
        ("too few sums", lambda ranks: [[layout, sums[:2]] for layout, sums in ranks]),
    ],
)
def test_what_cannot_be_compared_is_used(
    prefill: EngineProcess, decode: EngineProcess, why: str, change: Callable[[Any], Any]
) -> None:
    asked = request(why, 7)
    matches, mismatches, skipped = counts(decode)
    deltas = decode.generate(asked, with_checksums(prefill.prefill(asked), change))
    assert last_report(deltas).transferred_tokens == PROMPT_TOKENS
    assert counts(decode) == (matches, mismatches, skipped + 1)
