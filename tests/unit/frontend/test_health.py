"""What a model's pools let it do, and what that means for all."""

from typing import Any

import pytest

from app.config import ModelConfig
from app.frontend.health import model_state, overall_status


@pytest.mark.parametrize(
    ("prefill", "decode", "aggregated", "vllm", "sglang"),
    [
        (None, 1, None, "ready", "ready"),
        (None, 0, None, "unavailable", "unavailable"),
        (1, 2, None, "ready", "ready"),
        (0, 2, None, "degraded", "unavailable"),
        (1, 0, None, "degraded", "unavailable"),
        (0, 0, None, "unavailable", "unavailable"),
        (1, 1, 1, "ready", "ready"),
        (1, 1, 0, "degraded", "degraded"),
        (1, 0, 1, "degraded", "degraded"),
        (0, 1, 1, "degraded", "degraded"),
        (0, 0, 1, "degraded", "degraded"),
        (0, 1, 0, "degraded", "unavailable"),
        (1, 0, 0, "degraded", "unavailable"),
        (0, 0, 0, "unavailable", "unavailable"),
    ],
)
@pytest.mark.parametrize("engine", ["vllm", "sim", "sglang"])
def test_a_model_is_as_whole_as_its_pools(
    engine: str, prefill: int | None, decode: int, aggregated: int | None, vllm: str, sglang: str
) -> None:
    """None is a pool that the model does not have."""
    pools = {"prefill": prefill, "decode": decode, "aggregated": aggregated}
    ready: Any = {role: count for role, count in pools.items() if count is not None}
    fields = {"name": "m", "source": "baton:tiny", **{role: {"engine": engine} for role in ready}}
    assert model_state(ModelConfig.model_validate(fields), ready) == (sglang if engine == "sglang" else vllm)


@pytest.mark.parametrize(
    ("states", "status"),
    [
        (["ready"], "healthy"),
        (["ready", "ready"], "healthy"),
        (["ready", "degraded"], "degraded"),
        (["ready", "unavailable"], "degraded"),
        (["degraded", "unavailable"], "degraded"),
        (["degraded", "degraded"], "degraded"),
        (["unavailable", "unavailable"], "unhealthy"),
        (["asleep"], "healthy"),
        (["asleep", "ready"], "healthy"),
        (["asleep", "unavailable"], "degraded"),
    ],
)
def test_the_status_counts_what_is_served(states: Any, status: str) -> None:
    assert overall_status(states) == status


@pytest.mark.parametrize(
    ("prefill", "decode", "vllm", "sglang"),
    [(0, 0, "asleep", "asleep"), (1, 0, "degraded", "asleep"), (0, 1, "degraded", "asleep"), (1, 1, "ready", "ready")],
)
@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_a_model_that_may_sleep_is_not_unavailable(
    engine: str, prefill: int, decode: int, vllm: str, sglang: str
) -> None:
    pool = {"engine": engine, "autoscaling": {"min_replicas": 0, "max_replicas": 2}}
    model = ModelConfig.model_validate({"name": "m", "source": "baton:tiny", "prefill": pool, "decode": pool})
    assert model_state(model, {"prefill": prefill, "decode": decode}) == (sglang if engine == "sglang" else vllm)
