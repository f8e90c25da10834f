"""Measures how long the router takes to decide, by the sizes of fleet and prompt and by how many replicas cache it."""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterator
from random import Random
from statistics import median, quantiles

import msgspec

from app.config import RoutingConfig, SloConfig
from app.kv_cache.block_hashes import block_hashes
from app.messages import GenerateRequest, KvUpdate, PrefillReport, ReplicaInfo, ReplicaLoad, Role
from app.routing.decision import Decision
from app.routing.router import Router

ROLES: tuple[Role, ...] = ("prefill", "decode")
BLOCK_SIZE = 16
"""vLLM's: the most hashes for a prompt."""
REPLICAS_PER_NODE = 8
NUM_WARM_UP = 20
"""How many decisions are not measured; after these the router predicts."""


class DecisionTime(msgspec.Struct, frozen=True):
    """One line of the result."""

    num_replicas: int
    """The replicas in each of the two pools."""
    prompt_tokens: int
    num_matching: int
    """How many replicas of each pool have the whole prompt cached."""
    median_us: float
    p99_us: float
    hashing_us: float
    """The median time of hashing the prompt's blocks, which is part of a decision."""


def measure_decisions(
    fleet_sizes: list[int],
    prompt_lengths: list[int],
    matching: list[int],
    *,
    num_blocks: int,
    repeat: int,
    seed: int,
) -> Iterator[DecisionTime]:
    """Measure each combination, with `num_blocks` blocks in each pool's index: `repeat` decisions on different prompts.

    A prompt is wholly cached by the given number of replicas of each pool, drawn for it, and by no others.  The router
    learns from each request as in production, so the decisions include the fitting of its model of times.
    """
    for num_replicas in fleet_sizes:
        random = Random(seed)
        router, names = loaded_router(num_replicas, num_blocks, random)
        for length in prompt_lengths:
            for num in matching:
                if num <= num_replicas:
                    yield _measure(router, names, length, num, repeat, random)


def loaded_router(num_replicas: int, num_blocks: int, random: Random) -> tuple[Router, dict[Role, list[str]]]:
    """Return a router with two pools of `num_replicas` busy replicas, and the ids of these replicas.

    The caches of each pool's replicas hold `num_blocks` blocks together, no two of them the same.
    """
    router = Router(RoutingConfig(), SloConfig(), has_prefill=True)
    names: dict[Role, list[str]] = {role: [f"{role}-{index}" for index in range(num_replicas)] for role in ROLES}
    for role in ROLES:
        pool = router.pools[role]
        for index, name in enumerate(names[role]):
            pool.join(_info(role, name, index))
            pool.on_load(name, ReplicaLoad(random.randrange(16), random.randrange(1024), random.randrange(8192)))
            stored = [random.getrandbits(63) for _ in range(num_blocks // num_replicas)]
            pool.on_kv(name, KvUpdate(stored=stored, removed=[]))
    for _ in range(NUM_WARM_UP):
        _serve(router, _prompt(1000, random))
    return router, names


def _info(role: Role, name: str, index: int) -> ReplicaInfo:
    return ReplicaInfo(
        replica_id=name,
        role=role,
        model="model",
        engine="vllm",
        engine_version="",
        node_ip=f"node-{index // REPLICAS_PER_NODE}",
        pid=0,
        num_blocks=42_915,
        block_size_tokens=BLOCK_SIZE,
        max_model_len=131_072,
        prefix_cache="published",
    )


def _prompt(length: int, random: Random) -> list[int]:
    return array("H", random.randbytes(2 * length)).tolist()


def _measure(
    router: Router, names: dict[Role, list[str]], length: int, num_matching: int, repeat: int, random: Random
) -> DecisionTime:
    decided, hashed = [], []
    for _ in range(repeat):
        prompt = _prompt(length, random)
        begin = time.perf_counter()
        hashes = list(block_hashes(prompt, BLOCK_SIZE, 0))
        hashed.append(time.perf_counter() - begin)
        holders = {role: random.sample(names[role], num_matching) for role in ROLES}
        _tell(router, holders, KvUpdate(stored=hashes, removed=[]))
        decided.append(_serve(router, prompt))
        _tell(router, holders, KvUpdate(stored=[], removed=hashes))
    p99 = quantiles(decided, n=100, method="inclusive")[98]
    return DecisionTime(
        len(names["decode"]), length, num_matching, median(decided) * 1e6, p99 * 1e6, median(hashed) * 1e6
    )


def _tell(router: Router, replicas: dict[Role, list[str]], update: KvUpdate) -> None:
    for role, names in replicas.items():
        for name in names:
            router.pools[role].on_kv(name, update)


def _serve(router: Router, prompt: list[int]) -> float:
    """Return how many seconds the router takes to decide.  The request then succeeds, and the router learns from it."""
    request = GenerateRequest(request_id="", prompt_token_ids=prompt, sampling={})
    begin = time.perf_counter()
    decision = router.decide(request)
    seconds = time.perf_counter() - begin
    assert isinstance(decision, Decision)  # the load leaves room
    in_flight = router.begin(request, decision)
    report = PrefillReport(
        kind=decision.kind,
        reason="",
        prefill_replica=decision.prefill.replica if decision.prefill else None,
        decode_replica=decision.serving.replica,
        cached_tokens=0,
        transferred_tokens=len(prompt) if decision.prefill else 0,
        transport="",
    )
    in_flight.first_token(report, time.perf_counter() - begin - seconds)
    in_flight.end()
    return seconds
