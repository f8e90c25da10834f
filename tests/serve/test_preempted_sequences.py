"""Flex sequences give way to a higher class on a running application, and no token of theirs changes."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from ray import serve

from tests.conftest import wait_until

pytestmark = pytest.mark.serve

SLOTS = 4
"""Sequences that decode at once."""


def arguments() -> dict[str, Any]:
    pool = {"engine": "sim", "resources": {"num_cpus": 0.1}}
    engine_args = {"max_model_len": 2048, "num_blocks": 512, "profile": "h200-llama-8b", "speed_up": 1.0}
    return {
        "models": [
            {
                "name": "tiny",
                "source": "baton:tiny",
                "engine_args": engine_args,
                "prefill": pool,
                "decode": {**pool, "engine_args": {"max_num_seqs": SLOTS}},
                "routing": {"placement": {"policy": "remote"}},
            }
        ],
        "transfer": {},
        "frontend": {"resources": {"num_cpus": 0.1}},
    }


class Stream:
    """A streamed answer and its text so far."""

    def __init__(self, url: str, start: int, max_tokens: int, tier: str = "flex") -> None:
        self.text = ""
        self.is_done = False
        self._url = f"{url}/v1/completions"
        self._body = {
            **{"model": "tiny", "prompt": list(range(start, start + 100)), "max_tokens": max_tokens},
            **{"ignore_eos": True, "temperature": 0, "stream": True, "service_tier": tier},
        }
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        with httpx.stream("POST", self._url, json=self._body, timeout=60) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    self.text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
                self.is_done = self.is_done or line == "data: [DONE]"

    def whole(self) -> str:
        self._thread.join(60)
        assert self.is_done
        return self.text


@pytest.fixture(scope="module")
def url(serve_url: str) -> Iterator[str]:
    from deployments.build import build

    serve.run(build(arguments()), name="preempting", route_prefix="/preempting")
    url = f"{serve_url}/preempting"
    wait_until(lambda: httpx.get(f"{url}/health").json()["status"] == "healthy", 30, "both pools ready")
    yield url
    serve.delete("preempting")


def count(url: str, sample: str, **labels: str) -> float:
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics").text)
    found = [each for family in families for each in family.samples if each.name == sample]
    return sum(each.value for each in found if labels.items() <= each.labels.items())


def test_flex_streams_pause_for_others_and_end_as_if_nothing_had_been(url: str) -> None:
    flex_starts = range(300, 300 + 100 * SLOTS, 100)
    alone = [Stream(url, start, 400).whole() for start in flex_starts]  # some 2 s each
    flex = [Stream(url, start, 400) for start in flex_starts]
    wait_until(lambda: all(stream.text for stream in flex), 10, "all flex streams run", 0.01)
    default = [Stream(url, start, 50, "default") for start in range(1000, 1000 + 100 * SLOTS, 100)]
    texts = [stream.whole() for stream in default]
    assert all(texts)
    assert not any(stream.is_done for stream in flex), "they were waited for"
    assert [stream.whole() for stream in flex] == alone
    assert count(url, "baton_resume_gap_seconds_count", reason="preempted") == SLOTS
    assert count(url, "baton_resume_gap_seconds_count") == SLOTS
    assert count(url, "baton_sequences_total", end="length") == 3 * SLOTS

    def used_blocks() -> int:
        return sum(replica["num_used_blocks"] for replica in httpx.get(f"{url}/stats").json()["replicas"])

    wait_until(lambda: used_blocks() == 0, 10, "blocks returned")
