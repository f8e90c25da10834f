"""Which pools can trade their replicas, and what `baton scale --switch` refuses."""

from __future__ import annotations

from typing import Any

import pytest

from app.config import ModelConfig, parse
from app.errors import ConfigError
from app.preflight import check, replica_budget
from app.replica_bounds import parse_targets
from app.role_trade import check_trade, describe_trade
from deployments import switch
from deployments.switch import check_targets

SCALES = {"min_replicas": 1, "max_replicas": 4}


def arguments(engine: str = "sim", prefill: Any = None, decode: Any = None, **more: Any) -> dict[str, Any]:
    pools = {"prefill": {"engine": engine, **(prefill or {})}, "decode": {"engine": engine, **(decode or {})}}
    return {"models": [{"name": "m", "source": "baton:tiny", **pools, **more}], "transfer": {}}


def model(*given: Any, **more: Any) -> ModelConfig:
    return parse(arguments(*given, **more)).models[0]


def test_pools_that_are_alike_can_trade() -> None:
    assert check_trade("models.0", model()) == []
    assert check_trade("models.0", model("vllm")) == []


def test_what_limits_a_switch_is_said() -> None:
    pools = model("vllm", {"engine_args": {"enforce_eager": True}}, {"engine_args": {"max_num_seqs": 64}})
    assert check_trade("models.0", pools) == [
        "models.0: enforce_eager is True at prefill and not set at decode; a replica that switches keeps its own",
        "models.0: max_num_seqs is not set at prefill and 64 at decode; a replica that switches keeps its own",
    ]


@pytest.mark.parametrize(
    ("given", "field"),
    [
        (model("sglang"), "models.0.decode.engine"),
        (model("vllm", {"tensor_parallel_size": 2}), "models.0.prefill.tensor_parallel_size"),
        (model("vllm", {"engine_args": {"max_model_len": 2048}}), "models.0.prefill.engine_args.max_model_len"),
        (model("vllm", {"engine_args": {"block_size": 32}}), "models.0.prefill.engine_args.block_size"),
        (model("vllm", None, {"resources": {"num_gpus": 0.5}}), "models.0.prefill.resources.num_gpus"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_forbids_a_switch_is_named(given: ModelConfig, field: str) -> None:
    with pytest.raises(ConfigError) as raised:
        check_trade("models.0", given)
    assert raised.value.field == field


def test_baton_check_says_which_pools_can_trade() -> None:
    assert describe_trade("models.0", model()) == [
        "models.0: replicas can switch between prefill and decode while they run"
    ]
    (line,) = describe_trade("models.0", model("sglang"))
    assert line.startswith("replicas cannot switch between prefill and decode: models.0.decode.engine: sglang starts")


def test_without_a_prefill_pool_there_is_nothing_to_switch() -> None:
    alone = parse({"models": [{"name": "m", "source": "baton:tiny", "decode": {"engine": "sim"}}]}).models[0]
    with pytest.raises(ConfigError, match=r"models\.0\.prefill: missing"):
        check_trade("models.0", alone)


@pytest.mark.parametrize(
    ("targets", "problem"),
    [
        (["prefill=3", "decode=2"], "5 replicas are wanted, but 4 run"),
        (["prefill=3"], "say how many replicas prefill and decode"),
        (["prefill=1..3", "decode=1"], "say how many replicas prefill and decode"),
        (["prefill=3", "decode=1", "frontend=2"], "say how many replicas prefill and decode"),
    ],
)
def test_a_switch_is_of_all_replicas_that_run(targets: list[str], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        check_targets(model(), parse_targets(targets), 4)
    assert check_targets(model(), parse_targets(["prefill=3", "decode=1"]), 4) == 3


def test_a_budget_is_for_autoscaling_alone() -> None:
    scaling = {"autoscaling": SCALES}
    with pytest.raises(ConfigError, match="autoscaling decides the roles"):
        check_targets(model("sim", scaling, scaling, gpus=4), parse_targets(["prefill=3", "decode=1"]), 4)
    with pytest.raises(ConfigError, match="gpus is a budget for autoscaling"):
        model("sim", scaling, gpus=4)


def test_a_budget_has_to_be_enough_for_the_least_that_may_run() -> None:
    three = {"autoscaling": {**SCALES, "min_replicas": 3}}
    with pytest.raises(ConfigError, match="4 is enough for 4 replicas, but min_replicas of both pools are 6"):
        check(parse(arguments("sim", three, three, gpus=4)), [])
    check(parse(arguments("sim", three, three, gpus=6)), [])
    sized = model("vllm", {"tensor_parallel_size": 2}, {"tensor_parallel_size": 2})
    assert replica_budget(9, sized.decode) == 4


def test_a_budget_is_refused_where_pools_cannot_trade() -> None:
    scaling = {"autoscaling": SCALES}
    with pytest.raises(ConfigError, match="starts each engine for one role"):
        check(parse(arguments("sglang", scaling, scaling, gpus=4)), [])


def test_a_switch_forgets_the_roles_of_replicas_that_serve_no_longer_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    forgotten: list[str] = []
    assigned = {"decode-1": "prefill", "decode-2": "prefill", "prefill-9": "decode"}
    monkeypatch.setattr(switch, "read_roles", lambda application, model: assigned)
    monkeypatch.setattr(switch, "forget_told", lambda application, replica: forgotten.append(replica))
    known = {"prefill-m": ["prefill-1"], "decode-m": ["decode-1", "decode-2"]}
    deployments = {name: {"replicas": [{"replica_id": replica} for replica in known[name]]} for name in known}
    running: dict[str, Any] = {"prefill-1": "prefill", "decode-1": "decode"}
    absent = switch._absent("a", model(), {"applications": {"a": {"deployments": deployments}}}, running)
    assert (absent, forgotten) == ({"decode-2": "prefill"}, ["prefill-9"]), "decode-2 is only being found again"
