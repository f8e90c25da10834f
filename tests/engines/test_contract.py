"""vLLM and SGLang keep the contract of all engines, each as a prefill and a decode engine of the same application."""

from __future__ import annotations

import random
import re

import pytest

from app.engines.ucx import LANES_BY_REQUIREMENT
from tests.engine_contract import EngineContract, Pair
from tests.engines.conftest import Baton

pytestmark = [pytest.mark.serve, pytest.mark.engine, pytest.mark.timeout(600)]


def make_prompt(num_tokens: int) -> list[int]:
    return random.choices(range(300, 2000), k=num_tokens)


@pytest.fixture
async def pair(real: Baton) -> Pair:
    real.wait_until_healthy()
    prefill, decode = real.engine_of("prefill"), real.engine_of("decode")
    is_vllm = real.engine == "vllm"
    pair = Pair(prefill, decode, make_prompt, num_tokens_of_slow=3500, can_decode_prefill=is_vllm, keeps_kv=is_vllm)
    await pair.until_idle()
    return pair


class TestContract(EngineContract):
    async def test_ucx_says_what_kv_moves_by(self, pair: Pair) -> None:
        """UCX logs the line that `UcxLog` looks for, and the lanes in it have names that `UcxLog` knows."""
        request = pair.request()
        await pair.begin(request, await pair.prefill.prefill(request)).task
        sides = [(await engine.stats()).transport for engine in (pair.prefill, pair.decode)]
        found = next(filter(None, sides))
        assert found.startswith("intra-node "), sides
        known = tuple(lane for lanes in LANES_BY_REQUIREMENT.values() for lane in lanes)
        lanes = re.findall(r"(\w+)/", found)
        assert lanes, sides
        assert all(lane.startswith(known) for lane in lanes), sides
