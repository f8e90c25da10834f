"""The topology: what the deployments are called, what each is given and what a change restarts."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from app import build as building
from app.errors import ConfigError
from app.preflight import REPOSITORY

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

    def identities(args: dict[str, Any]) -> set[tuple[str, str]]:
        found = set()
        for name, deployment in deployments(args).items():
            deployment._deployment_config.version = "as Serve does it"
            found.add((name, f"{deployment._deployment_config.version} {deployment.ray_actor_options}"))
        return found

    return {name for name, _ in identities(args) - identities(ARGS)}


def changed(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    args = copy.deepcopy(ARGS)
    change(args)
    return args


def test_each_pool_is_named_after_its_model():
    assert set(deployments(ARGS)) == {"frontend"} | FIRST | SECOND | THIRD


def test_a_pools_name_does_not_depend_on_other_models():
    assert set(deployments({**ARGS, "models": ARGS["models"][:1]})) == {"frontend"} | FIRST


def test_each_pool_is_given_its_model_alone():
    for name, deployment in deployments(ARGS).items():
        if name != "frontend":
            (model,) = deployment.init_args[0].models
            assert name.endswith(model.name.replace("/", "-"))


def test_the_frontend_has_the_handles_of_all_pools_in_the_order_of_the_models():
    _, pools = deployments(ARGS)["frontend"].init_args
    assert all(isinstance(handle, DeploymentHandle) for pool in pools for handle in pool.values())
    names = [{role: handle.deployment_name for role, handle in pool.items()} for pool in pools]
    assert names == [
        {"decode": "decode-org-first", "prefill": "prefill-org-first"},
        {"decode": "decode-second"},
        {"decode": "decode-third", "prefill": "prefill-third", "aggregated": "aggregated-third"},
    ]


def test_an_aggregated_pool_has_nothing_to_do_with_transfers():
    config = deployments(ARGS)["aggregated-third"].init_args[0]
    assert config.transfer is None
    assert not config.models[0].is_disaggregated
    assert config.models[0].aggregated.engine == "sim"
    assert deployments(ARGS)["decode-third"].init_args[0].models[0].is_disaggregated


def test_every_pool_that_decodes_scales_by_its_sequences():
    def scale(args: dict[str, Any]) -> None:
        for pool in ("prefill", "decode", "aggregated"):
            args["models"][2][pool] = {"engine": "sim", "autoscaling": {"max_replicas": 3}}

    found = deployments(changed(scale))
    policies = {name: found[name]._deployment_config.autoscaling_config.policy.policy_function for name in THIRD}
    assert policies.pop("prefill-third") != building.POLICY
    assert set(policies.values()) == {building.POLICY}


def test_wrong_autoscaling_of_an_aggregated_pool_is_refused():
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
        (lambda args: args["models"].append({**ARGS["models"][1], "name": "new"}), {"frontend", "decode-new"}),
        (lambda args: args["models"].pop(), {"frontend"}),
        (lambda args: args["models"].reverse(), {"frontend"}),
        (lambda args: args["models"][0]["engine_args"].update(max_model_len=256), {"frontend"} | FIRST),
        (lambda args: args["models"][0]["decode"].update(engine_args={"seed": 1}), {"frontend", "decode-org-first"}),
        (lambda args: args["models"][0]["decode"].update(environment={"A": "1"}), {"frontend", "decode-org-first"}),
        (lambda args: args["models"][1]["decode"].update(python="/opt/python"), {"frontend"} | SECOND),
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
        (lambda args: args["models"][2].update(routing={"max_queued_tokens": 5}), {"frontend"}),
    ],
    ids=[
        "nothing",
        "replicas",
        "autoscaling",
        "frontends",
        "a new model",
        "a model less",
        "another order",
        "engine arguments",
        "one pool's engine arguments",
        "one pool's environment",
        "one pool's Python",
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
def test_a_change_restarts_what_it_concerns(change: Callable[[dict[str, Any]], Any], names: set[str]):
    assert restarted(changed(change)) == names


@pytest.mark.parametrize(
    ("python", "runs"),
    [
        ("/opt/python 3/bin/python", "'/opt/python 3/bin/python'"),
        ("env/bin/python", str(REPOSITORY / "env/bin/python")),
    ],
)
def test_the_replicas_of_a_pool_run_in_its_python(python: str, runs: str):
    args = changed(lambda args: args["models"][0]["decode"].update(python=python, environment={"A": "1"}))
    environments = {name: d.ray_actor_options["runtime_env"] for name, d in deployments(args).items()}
    assert environments["decode-org-first"] == {"env_vars": {"A": "1"}, "py_executable": runs}
    assert all("py_executable" not in environments[name] for name in ("prefill-org-first", *SECOND, *THIRD, "frontend"))


def test_a_pool_runs_only_on_nodes_with_its_labels():
    def label(args: dict[str, Any]) -> None:
        args["models"][0]["prefill"]["resources"] = {"node_labels": {"baton/pool": "prefill"}}

    options = {name: deployment.ray_actor_options for name, deployment in deployments(changed(label)).items()}
    assert options["prefill-org-first"]["label_selector"] == {"baton/pool": "prefill"}
    assert not any("label_selector" in given for name, given in options.items() if name != "prefill-org-first")


def test_another_slo_restarts_no_engine():
    assert restarted(changed(lambda args: args["models"][0].update(slo={"ttft_ms": 500}))) == {"frontend"}
