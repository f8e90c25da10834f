"""Replicas and requests for the tests of routing."""

from __future__ import annotations

from typing import Any

from app.kv_cache.block_hashes import block_hashes, root_hash
from app.messages import GenerateRequest, ReplicaInfo

BLOCK_SIZE = 16


def replica_info(replica: str, role: Any = "decode", **fields: Any) -> ReplicaInfo:
    defaults: dict[str, Any] = {
        "model": "m",
        "engine": "sim",
        "engine_version": "1",
        "node_ip": "10.0.0.1",
        "pid": 1,
        "num_blocks": 1000,
        "block_size_tokens": BLOCK_SIZE,
        "max_model_len": 100_000,
        "prefix_cache": "published",
    }
    return ReplicaInfo(replica_id=replica, role=role, **{**defaults, **fields})


def prompt(num_tokens: int, start: int = 0) -> list[int]:
    """Prompts with different starts have no token in common, and equal starts make one the prefix of the other."""
    return list(range(start, start + num_tokens))


def request(num_tokens: int = 160, start: int = 0, **fields: Any) -> GenerateRequest:
    defaults: dict[str, Any] = {"request_id": "r", "prompt_token_ids": prompt(num_tokens, start), "sampling": {}}
    return GenerateRequest(**{**defaults, **fields})


def hashes(num_tokens: int, start: int = 0, salt: str | None = None) -> list[int]:
    """Of the full blocks of `prompt(num_tokens, start)`."""
    return list(block_hashes(prompt(num_tokens, start), BLOCK_SIZE, root_hash(salt)))
