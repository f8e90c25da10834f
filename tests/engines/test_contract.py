"""vLLM and SGLang keep the contract of all engines, each as a prefill and a decode engine of the same application."""

from __future__ import annotations

import re

import pytest

from app.engines.ucx import LANES_BY_REQUIREMENT
from tests.engine_contract import EngineContract, Pair

pytestmark = [pytest.mark.serve, pytest.mark.engine, pytest.mark.timeout(600)]


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
