"""The topology: what the deployments are called, what each is given and what a change restarts."""

import copy
import functools
import json
from collections.abc import Callable
from typing import Any

import pytest
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from app.config import parse
from app.errors import ConfigError
from app.preflight import REPOSITORY
from deployments import build as building

ARGS: dict[str, Any] = {
    "models": [
        {
            "name": "org/first",
            "source": "baton:tiny",
            "engine_args": {"max_model_len": 512},
            "prefill": {"engine": "sim"},
            "decode": {"engine": "sim"},
        },
        {"name": "second", "source": "baton:tiny", "decode": {"engine": "sim"}},
        {
            "name": "third",
            "source": "baton:tiny",
            "prefill": {"engine": "sim"},
            "decode": {"engine": "sim"},
            "aggregated": {"engine": "sim"},
        },
    ],
    "transfer": {},
}
FIRST = {"decode-org-first", "prefill-org-first"}
SECOND = {"decode-second"}
THIRD_APART = {"decode-third", "prefill-third"}
THIRD = THIRD_APART | {"aggregated-third"}


@pytest.fixture(autouse=True)
def without_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "_gpus_per_node", list)


def deployments(args: dict[str, Any]) -> dict[str, Any]:
    """What Serve makes of the application, by name."""
    from ray.serve._private.build_app import build_app

    application: Application = building.build(copy.deepcopy(args))
    return {deployment.name: deployment for deployment in build_app(application, name="baton").deployments}


def restarted(args: dict[str, Any]) -> set[str]:
    """The deployments whose replicas Serve would replace on the way from ARGS to `args`, or that are new."""

    return {name for name, _ in identities(json.dumps(args)) - identities(json.dumps(ARGS))}


@functools.cache
def identities(args: str) -> frozenset[tuple[str, str]]:
    """The deployments of `args` (JSON), each with what Serve restarts its replicas for."""
    found = set()
    for name, deployment in deployments(json.loads(args)).items():
        deployment._deployment_config.version = "as Serve does it"
        found.add((name, f"{deployment._deployment_config.version} {deployment.ray_actor_options}"))
    return frozenset(found)


def changed(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    args = copy.deepcopy(ARGS)
    change(args)
    return args


def test_each_pool_is_named_after_its_model() -> None:
    assert set(deployments(ARGS)) == {"frontend"} | FIRST | SECOND | THIRD


def test_a_pools_name_does_not_depend_on_other_models() -> None:
    assert set(deployments({**ARGS, "models": ARGS["models"][:1]})) == {"frontend"} | FIRST


def test_each_pool_is_given_its_model_alone() -> None:
    for name, deployment in deployments(ARGS).items():
        if name != "frontend":
            (model,) = deployment.init_args[0].models
            assert name.endswith(model.name.replace("/", "-"))


def test_the_frontend_has_the_handles_of_all_pools_in_the_order_of_the_models() -> None:
    _, pools, ledger = deployments(ARGS)["frontend"].init_args
    assert ledger is None
    assert all(isinstance(handle, DeploymentHandle) for pool in pools for handle in pool.values())
    names = [{role: handle.deployment_name for role, handle in pool.items()} for pool in pools]
    assert names == [
        {"decode": "decode-org-first", "prefill": "prefill-org-first"},
        {"decode": "decode-second"},
        {"decode": "decode-third", "prefill": "prefill-third", "aggregated": "aggregated-third"},
    ]


def test_with_keys_there_is_a_ledger_beside_the_frontends() -> None:
    frontend = {"resources": {"num_cpus": 2, "node_labels": {"baton/group": "frontend"}}, "replicas": 3}
    found = deployments({**ARGS, "security": {"keys": "keys.yaml"}, "frontend": frontend})
    assert found["frontend"].init_args[2].deployment_name == "ledger"
    options = found["ledger"].ray_actor_options
    assert (options["num_cpus"], options["label_selector"]) == (0, {"baton/group": "frontend"})
    assert found["ledger"].num_replicas == 1
    assert "ledger" not in deployments(ARGS)


def test_an_aggregated_pool_has_nothing_to_do_with_transfers() -> None:
    config = deployments(ARGS)["aggregated-third"].init_args[0]
    assert config.transfer is None
    assert not config.models[0].is_disaggregated
    assert config.models[0].aggregated.engine == "sim"
    assert deployments(ARGS)["decode-third"].init_args[0].models[0].is_disaggregated


def autoscaled(**autoscaling: Any) -> dict[str, Any]:
    """ARGS with the frontend and the third model's pools autoscaled so."""

    def scale(args: dict[str, Any]) -> None:
        args["frontend"] = {"autoscaling": autoscaling}
        for pool in ("prefill", "decode", "aggregated"):
            args["models"][2][pool] = {"engine": "sim", "autoscaling": autoscaling}

    return changed(scale)


def autoscaling_of(args: dict[str, Any], name: str) -> Any:
    return deployments(args)[name]._deployment_config.autoscaling_config


def test_each_pool_scales_by_its_models_slo() -> None:
    args = autoscaled(max_replicas=3)
    args["models"][2]["slo"] = {"ttft_ms": 500, "itl_ms": 20}
    for role, is_for_prompts in {"prefill": True, "decode": False, "aggregated": True}.items():
        policy = autoscaling_of(args, f"{role}-third").policy
        assert policy.policy_function == building.POOL_POLICY
        targets = {
            "ttft_s": 0.5, "itl_s": 0.02, "sequences": None,
            "is_for_prompts": is_for_prompts, "is_for_decoding": role != "prefill",
        }  # fmt: skip
        assert policy.policy_kwargs == {"model": "third", "role": role, "may_sleep": False, **targets}


def test_a_decode_pool_without_prefill_is_for_prompts() -> None:
    args = changed(lambda args: args["models"][1]["decode"].update(autoscaling={"max_replicas": 3}))
    assert autoscaling_of(args, "decode-second").policy.policy_kwargs["is_for_prompts"]


def test_frontends_scale_by_baton_s_target_unless_the_user_has_another() -> None:
    assert autoscaling_of(autoscaled(max_replicas=3), "frontend").target_ongoing_requests == 200
    own = autoscaled(max_replicas=3, target_ongoing_requests=7)
    assert autoscaling_of(own, "frontend").target_ongoing_requests == 7
    assert autoscaling_of(own, "decode-third").policy.policy_kwargs["sequences"] == 7


def test_the_user_s_own_policy_counts() -> None:
    policy = {"policy_function": "ray.serve.autoscaling_policy:replica_queue_length_autoscaling_policy"}
    args = autoscaled(max_replicas=3, policy=policy)
    for name in ("frontend", "decode-third"):
        assert autoscaling_of(args, name).policy.policy_function == policy["policy_function"]


def test_serve_gets_the_policy_and_what_it_is_given() -> None:
    """As bytes, which its controller makes the policy of."""
    from ray.serve._private.autoscaling_state import _resolve_policy_callable
    from ray.serve._private.config import DeploymentConfig

    config = deployments(autoscaled(max_replicas=3))["decode-third"]._deployment_config
    received = DeploymentConfig.from_proto_bytes(config.to_proto_bytes()).autoscaling_config
    policy = _resolve_policy_callable(received.policy)
    assert policy._targets.ttft_s == 2.0


def sleepy(**autoscaling: Any) -> dict[str, Any]:
    args = autoscaled(min_replicas=0, max_replicas=3, **autoscaling)
    del args["frontend"]
    return args


def test_there_is_always_a_frontend_as_it_wakes_the_models() -> None:
    with pytest.raises(ConfigError) as caught:
        building.build(autoscaled(min_replicas=0, max_replicas=3))
    assert caught.value.field == "frontend.autoscaling.min_replicas"


def test_a_model_that_may_sleep_begins_awake_and_no_other_may() -> None:
    args = sleepy()
    for role in ("prefill", "decode", "aggregated"):
        found = autoscaling_of(args, f"{role}-third")
        assert (found.min_replicas, found.initial_replicas) == (0, 1)
        assert found.policy.policy_kwargs["may_sleep"]
    assert autoscaling_of(sleepy(initial_replicas=0), "decode-third").initial_replicas == 0
    assert [model.may_sleep for model in building.for_frontends(parse(args)).models] == [False, False, True]


@pytest.mark.parametrize("role", ["prefill", "decode", "aggregated"])
def test_a_model_s_pools_sleep_all_or_none(role: str) -> None:
    args = sleepy()
    args["models"][2][role]["autoscaling"] = {"min_replicas": 1, "max_replicas": 3}
    with pytest.raises(ConfigError, match=rf"not for {role}: a model's pools\s+sleep and wake together"):
        building.build(args)


def test_another_policy_would_wake_nobody() -> None:
    args = sleepy(policy={"policy_function": "ray.serve.autoscaling_policy:replica_queue_length_autoscaling_policy"})
    with pytest.raises(ConfigError, match="only Baton's own policy wakes pools") as caught:
        building.build(args)
    assert caught.value.field == "models.2.prefill.autoscaling.policy"


def test_wrong_autoscaling_of_an_aggregated_pool_is_refused() -> None:
    args = changed(lambda args: args["models"][2]["aggregated"].update(autoscaling={"max_replicas": 0}))
    with pytest.raises(ConfigError) as caught:
        building.build(args)
    assert caught.value.field == "models.2.aggregated.autoscaling.max_replicas"


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda args: None, set()),
        (lambda args: args["models"][0]["decode"].update(replicas=3), set()),
        (lambda args: args["models"][0]["decode"].update(autoscaling={"max_replicas": 3}), set()),
        (lambda args: args.update(frontend={"replicas": 2}), set()),
        (lambda args: args["models"][0]["decode"].update(max_surge_percent=0), set()),
        (lambda args: args["models"].append({**ARGS["models"][1], "name": "new"}), {"frontend", "decode-new"}),
        (lambda args: args["models"].pop(), {"frontend"}),
        (lambda args: args["models"].reverse(), {"frontend"}),
        (lambda args: args["models"][0]["engine_args"].update(max_model_len=256), {"frontend"} | FIRST),
        (lambda args: args["models"][0]["decode"].update(engine_args={"seed": 1}), {"frontend", "decode-org-first"}),
        (lambda args: args["models"][0]["decode"].update(environment={"A": "1"}), {"decode-org-first"}),
        (lambda args: args["models"][1]["decode"].update(python="/opt/python"), SECOND),
        (lambda args: args["models"][1]["decode"].update(drain_s=1), SECOND),
        (lambda args: args["models"][0].update(server_args={"chat_template": "x"}), {"frontend"}),
        (lambda args: args["models"][0].pop("prefill"), {"frontend", "decode-org-first"}),
        (lambda args: args["transfer"].update(lease_s=60), {"frontend"} | FIRST | THIRD_APART),
        (lambda args: args.update(limits={"max_body_bytes": 4096}), {"frontend"}),
        (lambda args: args.update(device="cuda"), {"frontend"} | FIRST | SECOND | THIRD),
        (lambda args: args["models"][2].pop("aggregated"), {"frontend"}),
        (lambda args: args["models"][0].update(aggregated={"engine": "sim"}), {"frontend", "aggregated-org-first"}),
        (lambda args: args["models"][2]["aggregated"].update(replicas=2), set()),
        (
            lambda args: args["models"][2]["aggregated"].update(engine_args={"seed": 1}),
            {"frontend", "aggregated-third"},
        ),
        (lambda args: args["models"][2]["decode"].update(engine_args={"seed": 1}), {"frontend", "decode-third"}),
        (lambda args: args["models"][2].update(routing={"placement": {"policy": "remote"}}), {"frontend"}),
    ],
    ids=[
        "nothing",
        "replicas",
        "autoscaling",
        "frontends",
        "surge",
        "a new model",
        "a model less",
        "another order",
        "engine arguments",
        "one pool's engine arguments",
        "one pool's environment",
        "one pool's Python",
        "when one pool hands over",
        "server arguments",
        "no prefill any more",
        "transfer",
        "limits of the frontend",
        "device",
        "no aggregated pool any more",
        "a new aggregated pool",
        "aggregated replicas",
        "the aggregated pool's engine arguments",
        "engine arguments beside an aggregated pool",
        "routing",
    ],
)
def test_a_change_restarts_what_it_concerns(change: Callable[[dict[str, Any]], Any], names: set[str]) -> None:
    assert restarted(changed(change)) == names


def test_a_new_replica_starts_before_an_old_one_ends_unless_there_is_no_room() -> None:
    args = changed(lambda args: args["models"][0]["prefill"].update(max_surge_percent=0))
    surge = {name: found._deployment_config.max_surge_percent for name, found in deployments(args).items()}
    assert surge.pop("prefill-org-first") == 0
    assert set(surge.values()) == {1}  # per cent, rounded up to one replica


@pytest.mark.parametrize(
    ("python", "runs"),
    [
        ("/opt/python 3/bin/python", "'/opt/python 3/bin/python'"),
        ("env/bin/python", str(REPOSITORY / "env/bin/python")),
    ],
)
def test_the_replicas_of_a_pool_run_in_its_python(python: str, runs: str) -> None:
    args = changed(lambda args: args["models"][0]["decode"].update(python=python, environment={"A": "1"}))
    environments = {name: d.ray_actor_options["runtime_env"] for name, d in deployments(args).items()}
    assert environments["decode-org-first"] == {"env_vars": {"A": "1"}, "py_executable": runs}
    assert all("py_executable" not in environments[name] for name in ("prefill-org-first", *SECOND, *THIRD, "frontend"))


def test_a_pool_runs_only_on_nodes_with_its_labels() -> None:
    def label(args: dict[str, Any]) -> None:
        args["models"][0]["prefill"]["resources"] = {"node_labels": {"baton/pool": "prefill"}}

    options = {name: deployment.ray_actor_options for name, deployment in deployments(changed(label)).items()}
    assert options["prefill-org-first"]["label_selector"] == {"baton/pool": "prefill"}
    assert not any("label_selector" in given for name, given in options.items() if name != "prefill-org-first")


def test_another_slo_restarts_no_engine() -> None:
    def change(args: dict[str, Any]) -> None:
        args["models"][0]["decode"]["autoscaling"] = {"max_replicas": 3}
        args["models"][0]["slo"] = {"ttft_ms": 500}

    assert restarted(changed(change)) == {"frontend"}


def test_all_pools_of_a_model_are_given_one_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chosen here, as the replicas may be on other CPUs."""
    monkeypatch.setattr("app.engine_defaults.cpu_dtype", lambda: "float32")
    model = {"name": "m", "source": "baton:tiny", "prefill": {}, "decode": {}, "aggregated": {}}
    built = deployments({"models": [model], "transfer": {}, "device": "cpu"})
    given = [deployment.init_args[0].models[0].engine_args for deployment in built.values()]
    assert given == [{"dtype": "float32"}] * 4


def test_pools_that_decode_on_gpus_are_given_chunks_that_fit_the_slo() -> None:
    """Chosen here, as the replicas are not given the slo."""
    pool = {"engine": "vllm"}
    model = {"name": "m", "source": "baton:shape/llama-8b", "slo": {"itl_ms": 50}, "prefill": pool, "decode": pool}
    built = deployments({"models": [model], "transfer": {}, "device": "cuda"})
    given = {
        role: built[f"{role}-m"].init_args[0].models[0].pool(role).engine_args.get("max_num_batched_tokens")
        for role in ("prefill", "decode")
    }
    assert given == {"prefill": None, "decode": 2048}
