"""The tests that need GPUs: `make test-gpu`.  A plain `pytest` leaves them out.

Most of them are those of tests/engines, on applications of real engines with a GPU each.  One application is started
for each module.  ``--device cpu`` runs the same on a CPU, to try the tests themselves.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest

from app.bench.gpus import count_gpus, too_few
from app.engine_defaults import cpu_dtype
from tests.engines.conftest import SGLANG_AGGREGATED as SGLANG_AGGREGATED
from tests.engines.conftest import Baton, opened_workers, pair, running, serving
from tests.engines.test_faults import healed

__all__ = ["healed", "opened_workers", "pair"]  # fixtures

GPUS = 2
TOLERANCE = 0.05
"""The logprob difference at which `baton verify` has to pass in bfloat16, where near ties differ between kernels."""
SMALL_STEPS = 128
"""Prompt tokens that an engine computes in one step.  A GPU computes the tiny model's longest prompt in a few
milliseconds, and then no test could do anything meanwhile; like this it takes some 30 steps."""


class Platform(NamedTuple):
    """Where the engines run, and what they need there."""

    device: Literal["cuda", "cpu"]
    vllm_args: dict[str, Any]
    sglang_args: dict[str, Any]
    sglang_python: str
    required_transport: str

    @property
    def dtype(self) -> str:
        return "bfloat16" if self.device == "cuda" else cpu_dtype()

    @property
    def num_gpus(self) -> int:
        return count_gpus() if self.device == "cuda" else 0


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gpu")
    group.addoption("--device", choices=["cuda", "cpu"], default="cuda")
    group.addoption("--vllm-args", default="{}", help="vLLM's engine arguments, as JSON")
    group.addoption("--sglang-args", default="{}", help="SGLang's engine arguments, as JSON")
    group.addoption("--sglang-python", default="", help="SGLang's interpreter; without it its tests are skipped")
    group.addoption("--required-transport", default="any", help="as transfer.required_transport, for vLLM's tests")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device", None) == "cuda" and (problem := too_few(GPUS)):
        pytest.exit(problem, returncode=1)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave this folder out where it was not named on the command line: pytest does not know its options then."""
    is_here = collection_path.is_relative_to(Path(__file__).parent)
    return True if is_here and config.getoption("--device", None) is None else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests that kill something last in each module."""
    modules = list(dict.fromkeys(item.path for item in items))

    def position(item: pytest.Item) -> tuple[int, bool]:
        origin = getattr(getattr(item, "function", None), "__module__", "")
        return modules.index(item.path), origin.endswith("test_faults") or "kill" in item.name

    items.sort(key=position)


@pytest.fixture(scope="session")
def platform(pytestconfig: pytest.Config) -> Platform:
    return Platform(
        device=pytestconfig.getoption("--device"),
        vllm_args=json.loads(pytestconfig.getoption("--vllm-args") or "{}"),
        sglang_args=json.loads(pytestconfig.getoption("--sglang-args") or "{}"),
        sglang_python=pytestconfig.getoption("--sglang-python"),
        required_transport=pytestconfig.getoption("--required-transport"),
    )


def vllm_model(platform: Platform, name: str, tensor_parallel_size: int = 1) -> dict[str, Any]:
    """Return the configuration of a vLLM model with prefill and decode apart."""
    on_gpus = {
        "gpu_memory_utilization": 0.3,
        "max_num_batched_tokens": SMALL_STEPS,
        "max_num_seqs": 64,
    }
    arguments = {"max_model_len": 4096, "block_size": 32, **(on_gpus if platform.device == "cuda" else {})}
    pool = {
        "tensor_parallel_size": tensor_parallel_size,
        "resources": {"num_cpus": 0.4},
        "environment": {"VLLM_CPU_KVCACHE_SPACE": "1"},
    }
    return {
        "name": name,
        "source": "baton:tiny",
        "engine_args": {**arguments, **platform.vllm_args},
        "routing": {"placement": {"policy": "remote"}},
        "prefill": pool,
        "decode": pool,
    }


def sglang_models(platform: Platform) -> list[dict[str, Any]]:
    """Return the configuration of an SGLang model with prefill and decode apart, and of the same model aggregated.

    Prefill has a GPU for itself; the two others share one.
    """
    on_gpus = {"mem_fraction_static": 0.35, "chunked_prefill_size": SMALL_STEPS}
    arguments = {
        "context_length": 4096,
        "page_size": 16,
        "max_total_tokens": 16384,
        "max_running_requests": 32,
        **(on_gpus if platform.device == "cuda" else {}),
        **platform.sglang_args,
    }
    pool: dict[str, Any] = {"engine": "sglang", "resources": {"num_cpus": 0.4}, "python": platform.sglang_python}
    half = {**pool, "resources": {"num_cpus": 0.4, **({"num_gpus": 0.5} if platform.device == "cuda" else {})}}
    model = {
        "name": "tiny-sglang",
        "source": "baton:tiny",
        "engine_args": arguments,
        "routing": {"placement": {"policy": "remote"}},
        "prefill": {**pool, "engine_args": {"disable_cuda_graph": True}},
        "decode": half,
    }
    return [model, {**model, "name": SGLANG_AGGREGATED, "prefill": None}]


def application_arguments(platform: Platform, models: list[dict[str, Any]], required_transport: str) -> dict[str, Any]:
    """Return the arguments of an application of `models`."""
    return {
        "models": models,
        "device": platform.device,
        "transfer": {"required_transport": required_transport},
        "frontend": {"resources": {"num_cpus": 0.4}},
    }


def serving_models(
    platform: Platform, url: str, models: list[dict[str, Any]], required_transport: str = "any"
) -> Iterator[Baton]:
    """Serve `models`, and yield the first of them."""
    first = models[0]
    with serving(application_arguments(platform, models, required_transport), url):
        for baton in running(url, first["name"], first["decode"].get("engine", "vllm"), platform.dtype):
            if platform.device == "cuda":
                baton.tolerance = TOLERANCE
            yield baton
