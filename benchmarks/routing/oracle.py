"""The hit rate that a prefix cache could reach: an upper bound that depends only on the trace and the caches' size."""

from __future__ import annotations

from app.bench.workload import Request
from app.engines.sim.blocks import BlockPool
from app.kv_cache.block_hashes import block_hashes
from benchmarks.routing.fleet import prompt_tokens


def oracle_hit_rate(requests: list[Request], block_size: int, num_blocks: int | None) -> float:
    """Return the share of prompt tokens that are cached if one LRU cache of `num_blocks` blocks serves all requests.

    With None the cache is unbounded.  It is the engines' own block pool.  No router over several caches can do better:
    no block is in it twice, each prompt is cached the moment it arrives, and neither answers nor waiting requests take
    blocks.
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
