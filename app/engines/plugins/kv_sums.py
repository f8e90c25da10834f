"""One number for each KV block that changes if the block's bytes do, over all layers of one engine's process.

A block's number is a sum of its 32-bit words, each times a weight of its own, modulo 2**64.  The weights are odd, so a
change of any one word changes the sum.  No two agree in their lowest 33 bits, while two words differ in at most 32, so
two words of a layer that change places change it as well.  Layers have weights too.  Other changes go unnoticed with a
probability of about 2**-64.  The words are integers whatever the KV's dtype, so NaN and -0.0 are nothing special.

Integer sums do not depend on their order: a GPU's and a CPU's are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache

import numpy as np
import torch

PART_BYTES = {"cpu": 2**20, "cuda": 8 * 2**20}
"""How much KV is summed at once, which takes three times as much memory: a GPU full of KV has to have that left, and on
a CPU it is to fit into the cache."""


@cache
def word_weights(count: int, device: torch.device) -> torch.Tensor:
    """Return the weights of a layer's words (int64)."""
    index = np.arange(count, dtype=np.uint64)
    low = (2 * index + 1) * np.uint64(0x9E3779B1) % np.uint64(2**33)
    return torch.from_numpy((_mixed(index) << np.uint64(33) | low).view(np.int64)).to(device)


@cache
def layer_weights(count: int, device: torch.device) -> torch.Tensor:
    """Return the weights of the layers (int64).

    They are no multiples of each other as those of words are in their lowest bits: both are multiplied, and a word that
    moves to another layer must not get the same product.
    """
    index = np.arange(count, dtype=np.uint64)
    return torch.from_numpy((_mixed(index) | np.uint64(1)).view(np.int64)).to(device)


def _mixed(index: np.ndarray) -> np.ndarray:
    """Return pseudo-random numbers of 64 bits, always the same: those of splitmix64."""
    mixed = (index + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def block_sums(layers: Sequence[torch.Tensor], block_ids: Sequence[int]) -> list[int]:
    """Return the sums (64 bits, signed) of these blocks.

    `layers` are uint8 of shape [blocks, bytes], on one device, and need not be contiguous from block to block.  On a
    GPU this waits for the sums but not for what the device is doing otherwise: nobody may write to the blocks.
    """
    if not block_ids:
        return []
    device = layers[0].device
    with torch.cuda.stream(_side_stream(device)) if device.type == "cuda" else nullcontext():
        ids = torch.tensor(block_ids, device=device)
        sums = torch.stack([_layer_sums(_words(layer), ids) for layer in layers])
        found: list[int] = (sums * layer_weights(len(layers), device)[:, None]).sum(0).tolist()
    return found


def _words(layer: torch.Tensor) -> torch.Tensor:
    is_aligned = all(number % 4 == 0 for number in (layer.shape[1], layer.stride(0), layer.storage_offset()))
    return layer.view(torch.int32) if is_aligned else layer


def _layer_sums(words: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    by_position = word_weights(words.shape[1], words.device)
    num_blocks = max(1, PART_BYTES[words.device.type] // (words.shape[1] * words.element_size()))
    return torch.cat([(words[part] * by_position).sum(1) for part in ids.split(num_blocks)])


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
