"""Whatever happens to KV on its way changes the sums of the blocks that it happened to, and no others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from app.engines.plugins import kv_sums
from app.engines.plugins.kv_sums import block_sums, layer_weights, word_weights

BLOCKS, BYTES, LAYERS = 5, 24, 3
ALL = list(range(BLOCKS))

few = settings(max_examples=30, deadline=None)
contents = st.binary(min_size=LAYERS * BLOCKS * BYTES, max_size=LAYERS * BLOCKS * BYTES)


def to_layers(content: bytes) -> list[torch.Tensor]:
    return list(torch.frombuffer(bytearray(content), dtype=torch.uint8).view(LAYERS, BLOCKS, BYTES))


def differing(one: list[int], other: list[int]) -> set[int]:
    return {index for index, (a, b) in enumerate(zip(one, other, strict=True)) if a != b}


@few
@given(contents, st.integers(0, LAYERS - 1), st.integers(0, BLOCKS - 1), st.integers(0, BYTES - 1), st.integers(1, 255))
def test_a_change_of_any_byte_is_noticed_in_its_block(
    content: bytes, layer: int, block: int, byte: int, change: int
) -> None:
    layers = to_layers(content)
    before = block_sums(layers, ALL)
    layers[layer][block, byte] ^= change
    assert differing(before, block_sums(layers, ALL)) == {block}


@few
@given(contents, st.permutations(ALL))
def test_blocks_that_change_places_are_noticed_unless_they_are_alike(content: bytes, order: list[int]) -> None:
    layers = to_layers(content)
    moved = [layer[order] for layer in layers]
    changed = {at for at in ALL if any(not torch.equal(a[at], b[at]) for a, b in zip(layers, moved, strict=True))}
    assert differing(block_sums(layers, ALL), block_sums(moved, ALL)) == changed


@few
@given(contents, st.permutations(range(LAYERS)))
def test_layers_that_change_places_are_noticed_unless_they_are_alike(content: bytes, order: list[int]) -> None:
    layers = to_layers(content)
    moved = [layers[index] for index in order]
    changed = {at for at in ALL if any(not torch.equal(a[at], b[at]) for a, b in zip(layers, moved, strict=True))}
    assert differing(block_sums(layers, ALL), block_sums(moved, ALL)) == changed


@pytest.mark.parametrize("word", [1, 2**31, 2**16, 0x80008000])
def test_words_that_change_places_are_noticed_though_they_differ_in_one_bit(word: int) -> None:
    """In an otherwise empty block.  -0.0 differs from 0.0 in the highest bit only."""
    found = set()
    for layer in range(LAYERS):
        for at in range(BYTES // 4):
            layers = [torch.zeros(1, BYTES // 4, dtype=torch.int64) for _ in range(LAYERS)]
            layers[layer][0, at] = word
            (total,) = block_sums([each.to(torch.int32).view(torch.uint8) for each in layers], [0])
            found.add(total)
    assert len(found) == LAYERS * BYTES // 4


@few
@given(contents, st.integers(1, BYTES - 1))
def test_a_shift_is_noticed(content: bytes, by: int) -> None:
    layers = to_layers(content)
    moved = [layer.roll(by, dims=1) for layer in layers]
    changed = {at for at in ALL if any(not torch.equal(a[at], b[at]) for a, b in zip(layers, moved, strict=True))}
    assert differing(block_sums(layers, ALL), block_sums(moved, ALL)) == changed


@pytest.mark.parametrize(("weights", "count"), [(word_weights, 50_000), (layer_weights, 1_000)])
def test_weights_are_odd_and_differ_in_their_lowest_33_bits(weights: Any, count: int) -> None:
    found = weights(count, torch.device("cpu")).tolist()
    assert all(weight % 2 for weight in found)
    assert len({weight % 2**33 for weight in found}) == count


def test_the_sums_of_two_releases_agree() -> None:
    """A prefill and a decode replica may be of two releases; other sums take another `CHECKSUMS`."""
    layers = [torch.arange(64, dtype=torch.uint8).view(2, 32) + layer for layer in range(2)]
    assert block_sums(layers, [1, 0]) == [324275493002599040, -2653897025360905600]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_any_dtype_is_taken_as_bytes(dtype: torch.dtype) -> None:
    """Also NaN, which is not equal to itself, and -0.0, which is equal to 0.0."""
    values = torch.tensor([[0.0, 1.0, float("nan"), -2.0] * 4], dtype=dtype)
    negated = values.clone()
    negated[0, 0] = -0.0
    assert block_sums([values.view(torch.uint8)], [0]) == block_sums([values.clone().view(torch.uint8)], [0])
    assert block_sums([values.view(torch.uint8)], [0]) != block_sums([negated.view(torch.uint8)], [0])


@few
@given(contents)
def test_neither_parts_nor_strides_change_the_sums(content: bytes) -> None:
    layers = to_layers(content)
    whole = block_sums(layers, ALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv_sums, "PART_BYTES", {"cpu": 2 * BYTES})
        assert block_sums(layers, ALL) == whole
    spread = torch.stack(layers, dim=1)  # [blocks, layers, bytes]
    assert block_sums([spread[:, index] for index in range(LAYERS)], ALL) == whole
    assert block_sums(layers, [3, 1]) == [whole[3], whole[1]]
    assert block_sums(layers, []) == []


@pytest.mark.parametrize(("rows", "offset", "size"), [(3, 1, 8), (3, 0, 7), (3, 2, 6)])
def test_blocks_that_are_not_made_of_words_are_summed_too(rows: int, offset: int, size: int) -> None:
    storage: Any = torch.arange(rows * 9, dtype=torch.uint8)
    layer = storage.as_strided((rows, size), (9, 1), offset)
    before = block_sums([layer], list(range(rows)))
    layer[2, size - 1] += 1
    assert differing(before, block_sums([layer], list(range(rows)))) == {2}
