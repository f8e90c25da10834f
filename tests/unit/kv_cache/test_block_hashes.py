"""The router's names of KV blocks: the same in every process, lazy, and different where the prompts are."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.kv_cache.block_hashes import block_hashes, hash_bytes, root_hash

TOKENS = st.lists(st.integers(0, 3), max_size=20)
BLOCK_SIZES = st.integers(1, 4)


def test_hashes_are_the_same_in_every_process() -> None:
    script = "from app.kv_cache.block_hashes import *; print(*block_hashes(range(64), 16, root_hash('tenant')))"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert outputs == {" ".join(map(str, block_hashes(range(64), 16, root_hash("tenant")))) + "\n"}


@given(TOKENS, TOKENS, BLOCK_SIZES)
def test_two_prompts_share_the_hashes_of_their_common_blocks_and_no_others(
    first: list[int], second: list[int], size: int
) -> None:
    def blocks(tokens: list[int]) -> list[list[int]]:
        return [tokens[start : start + size] for start in range(0, len(tokens) - size + 1, size)]

    shared = 0
    for one, other in zip(blocks(first), blocks(second), strict=False):
        if one != other:
            break
        shared += 1
    ours, theirs = list(block_hashes(first, size, 0)), list(block_hashes(second, size, 0))
    assert len(ours) == len(first) // size
    assert len(theirs) == len(second) // size
    assert ours[:shared] == theirs[:shared]
    assert not set(ours[shared:]) & set(theirs[shared:])


@given(TOKENS, BLOCK_SIZES, st.integers(0, 5))
def test_a_chain_goes_on_from_any_of_its_blocks(tokens: list[int], size: int, split: int) -> None:
    whole = list(block_hashes(tokens, size, root_hash(None)))
    at = min(split, len(whole))
    parent = whole[at - 1] if at else root_hash(None)
    assert list(block_hashes(tokens[at * size :], size, parent)) == whole[at:]


def test_prompts_with_different_salts_share_no_block() -> None:
    chains = [set(block_hashes(range(64), 16, root_hash(salt))) for salt in (None, "a", "b")]
    assert len(set.union(*chains)) == 3 * 4


def test_an_empty_salt_is_none_as_for_the_engines() -> None:
    assert root_hash("") == root_hash(None)


def test_similar_prompts_share_no_hash() -> None:
    chains = [block_hashes([a, b] * 8 + [b, a] * 8 + [0] * 16, 16, 0) for a in range(100) for b in range(100)]
    assert len({name for chain in chains for name in chain}) == 3 * 100 * 100


def test_no_more_is_hashed_than_is_asked_for() -> None:
    class Tokens(Sequence[int]):
        num_read = 0

        def __len__(self) -> int:
            return 1_000_000

        def __getitem__(self, index: object) -> int:  # type: ignore[override]
            raise AssertionError("read in order, by iteration")

        def __iter__(self) -> Iterator[int]:
            for token in range(len(self)):
                self.num_read += 1
                yield token

    tokens = Tokens()
    hashes = block_hashes(tokens, 16, 0)
    assert tokens.num_read == 0
    next(hashes)
    assert tokens.num_read == 16


@pytest.mark.parametrize(("block_hash", "size"), [(1, 32), (-(2**63), 48), (2**63, 48), (bytes(32), 80)])
def test_hashes_take_what_the_allocator_gives_out(block_hash: int | bytes, size: int) -> None:
    assert hash_bytes(block_hash) == size
