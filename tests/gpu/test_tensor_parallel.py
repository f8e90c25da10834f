"""vLLM with prefill and decode on two GPUs each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.engines.conftest import Baton
from tests.engines.test_serving import test_a_client_that_goes_away_during_decode_leaves_nothing_behind
from tests.engines.test_transfer import test_verify_fails_on_wrong_kv, test_verify_passes
from tests.gpu.conftest import Platform, serving_models, vllm_model

__all__ = [
    "test_a_client_that_goes_away_during_decode_leaves_nothing_behind",
    "test_verify_fails_on_wrong_kv",
    "test_verify_passes",
]

pytestmark = [pytest.mark.serve, pytest.mark.engine, pytest.mark.timeout(500)]


@pytest.fixture(scope="module", name="baton")
def two_gpus_each(serve_url: str, opened_workers: None, platform: Platform) -> Iterator[Baton]:
    if platform.num_gpus < 4:
        pytest.skip(f"this needs 4 GPUs, and this machine shows {platform.num_gpus}")
    models = [vllm_model(platform, "tiny-tp", tensor_parallel_size=2)]
    yield from serving_models(platform, serve_url, models, platform.required_transport)


@pytest.fixture(scope="module", name="served")
def only_this_is_served(baton: Baton) -> tuple[Baton, ...]:
    return (baton,)
