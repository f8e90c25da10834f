"""What hit rate a prefix cache could reach: an upper bound that depends on the trace and on the caches' size only."""

from __future__ import annotations

from app.bench.workload import Request
from app.engines.sim.blocks import BlockPool
from app.kv_cache.block_hashes import block_hashes
from benchmarks.routing.fleet import prompt_tokens


def oracle_hit_rate(requests: list[Request], block_size: int, num_blocks: int | None) -> float:
    """Cached prompt tokens over prompt tokens if one LRU cache of `num_blocks` blocks served all; None: unbounded.

    It is the engines' own block pool, and better than any router over several caches can be: no block is there twice,
    each prompt is cached the moment that it arrives, and no answer and no waiting request takes a block.
    """
    sizes = [-(-request.input_tokens // block_size) for request in requests]
    pool = BlockPool(sum(sizes) if num_blocks is None else num_blocks, block_size)
    prompt_total = cached_total = 0
    for request, size in zip(requests, sizes, strict=True):
        tokens = prompt_tokens(request)
        hashes = list(block_hashes(tokens, block_size, 0))
        found = pool.find(hashes[: (len(tokens) - 1) // block_size])
        blocks = pool.acquire(found, size - len(found))
        assert blocks is not None, "a prompt is longer than the cache"
        begin, end = len(found), len(hashes)
        parent = hashes[begin - 1] if begin else None
        pool.store(blocks[begin:end], hashes[begin:], parent, tokens[begin * block_size : end * block_size])
        pool.free(blocks)
        prompt_total += len(tokens)
        cached_total += begin * block_size
    return cached_total / prompt_total
