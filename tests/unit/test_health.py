"""What a model's pools let it do, and what that means for all."""

from typing import Any

import pytest

from app.config import ModelConfig
from app.health import model_state, overall_status


def model(engine: str, *, prefill: bool) -> ModelConfig:
    pool: dict[str, Any] = {"engine": engine}
    pools = {"decode": pool, **({"prefill": pool} if prefill else {})}
    return ModelConfig.model_validate({"name": "m", "source": "baton:tiny", **pools})


@pytest.mark.parametrize(
    ("engine", "prefill", "decode", "state"),
    [
        ("vllm", None, 1, "ready"),
        ("vllm", None, 0, "unavailable"),
        ("vllm", 1, 1, "ready"),
        ("vllm", 0, 1, "degraded"),
        ("vllm", 1, 0, "unavailable"),
        ("sim", 0, 2, "degraded"),
        ("sglang", None, 1, "ready"),
        ("sglang", 1, 1, "ready"),
        ("sglang", 0, 1, "unavailable"),
    ],
)
def test_a_model_is_as_whole_as_its_pools(engine: str, prefill: int | None, decode: int, state: str):
    ready: Any = {"decode": decode, **({} if prefill is None else {"prefill": prefill})}
    assert model_state(model(engine, prefill=prefill is not None), ready) == state


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
    ],
)
def test_the_status_counts_what_is_served(states: Any, status: str):
    assert overall_status(states) == status
