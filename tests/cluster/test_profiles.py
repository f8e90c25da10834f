"""Each profile's Serve config is one that Ray, Baton and the engines accept, and its replicas fit on its worker groups.

What would ask the hub (a model's own files: its length, the heads that tensor parallelism divides, its chat template)
or a GPU cannot be asked here; `baton check` asks where both are.
"""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingReply, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.common_pb2 import LabelSelectorOperator
from ray.serve.schema import ServeDeploySchema

from app.config import BatonConfig, parse
from app.errors import ConfigError
from app.models.tiny import ensure_tiny_model
from app.preflight import check, check_with_sglang
from deployments import build as building
from deployments.build import check_autoscaling
from tests.cluster.manifests import CLUSTER, Object, render
from tests.cluster.test_manifests import PROFILES, groups, profile, rayservice, with_components

MODELS = {
    "sglang-aggregated-default": {"deepseek-ai/DeepSeek-R1-Distill-Llama-8B": ("sglang", 0, 1)},
    "sglang-disaggregated-default": {"deepseek-ai/DeepSeek-R1-Distill-Llama-8B": ("sglang", 1, 1)},
    "sglang-disaggregated-70b": {"nvidia/Llama-3.3-70B-Instruct-FP8": ("sglang", 4, 4)},
    "sglang-disaggregated-70b-nvlink": {"nvidia/Llama-3.3-70B-Instruct-FP8": ("sglang", 4, 4)},
    "vllm-aggregated-default": {"Qwen/Qwen3-0.6B": ("vllm", 0, 1)},
    "vllm-disaggregated-default": {"Qwen/Qwen3-0.6B": ("vllm", 1, 1)},
    "vllm-disaggregated-8b": {"deepseek-ai/DeepSeek-R1-Distill-Llama-8B": ("vllm", 1, 1)},
    "vllm-disaggregated-70b": {"nvidia/Llama-3.3-70B-Instruct-FP8": ("vllm", 4, 4)},
    "multi-model": {
        "Qwen/Qwen3-0.6B": ("vllm", 0, 1),
        "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": ("sglang", 0, 1),
    },
}
"""Engine, and GPUs of the smallest prefill and decode pool, of each model: the table of README.md."""


@pytest.fixture(autouse=True)
def without_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "_gpus_per_node", list)


def serve_config(service: Object) -> dict[str, Any]:
    return dict(yaml.safe_load(service["spec"]["serveConfigV2"]))


def config_of(name: str) -> BatonConfig:
    (application,) = serve_config(rayservice(profile(name)))["applications"]
    return parse(application["args"])


def deployments(service: Object) -> dict[str, Any]:
    """What Serve makes of the RayService's application, by name, without any node."""
    from ray.serve._private.build_app import build_app

    (application,) = serve_config(service)["applications"]
    built = build_app(building.build(copy.deepcopy(application["args"])), name=application["name"])
    return {deployment.name: deployment for deployment in built.deployments}


def max_replicas(deployment: Any) -> int:
    settings = deployment._deployment_config
    return int(settings.autoscaling_config.max_replicas if settings.autoscaling_config else settings.num_replicas)


class Placement:
    """Where Ray's own autoscaler would put replicas, on the nodes that KubeRay makes of a RayService's groups."""

    def __init__(self, service: Object) -> None:
        cluster = {
            "metadata": {"name": "cluster", "namespace": "namespace"},
            "spec": copy.deepcopy(service["spec"]["rayClusterConfig"]),
        }
        self._config = AutoscalingConfig(_derive_autoscaling_config_from_ray_cr(cluster), skip_content_hash=True)

    def place(self, demands: list[tuple[Any, int]]) -> SchedulingReply:
        """With no node there yet: so many replicas of each deployment."""
        requests = [request for deployment, count in demands for request in [self._request(deployment)] * count]
        return ResourceDemandScheduler(event_logger=None).schedule(
            SchedulingRequest(
                disable_launch_config_check=True,
                node_type_configs=self._config.get_node_type_configs(),
                max_num_nodes=self._config.get_max_num_nodes(),
                resource_requests=ResourceRequestUtil.group_by_count(requests),
            )
        )

    @staticmethod
    def _request(deployment: Any) -> Any:
        options = deployment.ray_actor_options
        resources = {"CPU": options["num_cpus"], "GPU": options["num_gpus"], **options["resources"]}
        if "memory" in options:
            resources["memory"] = options["memory"]
        equal = LabelSelectorOperator.LABEL_OPERATOR_IN
        selector = [(label, equal, [value]) for label, value in options.get("label_selector", {}).items()]
        wanted = {name: amount for name, amount in resources.items() if amount}
        return ResourceRequestUtil.make(wanted, label_selectors=[selector] if selector else None)


def unplaceable(service: Object) -> list[str]:
    """What cannot be placed as it should, a line each: at `max_replicas` of every deployment, with all groups grown."""
    placement, found = Placement(service), deployments(service)
    problems = []
    for name, deployment in found.items():
        reply = placement.place([(deployment, 1)])
        wanted = deployment.ray_actor_options.get("label_selector", {}).get("baton/group")
        if reply.infeasible_resource_requests:
            problems.append(f"{name}: no worker group has a place for a replica: {_describe(deployment)}")
        elif [launch.instance_type for launch in reply.to_launch] != [wanted]:
            problems.append(f"{name}: lands on group {reply.to_launch[0].instance_type}, not on {wanted}")
    everything = placement.place([(deployment, max_replicas(deployment)) for deployment in found.values()])
    if not problems and (left := len(everything.infeasible_resource_requests)):
        problems.append(f"at max_replicas {left} replicas find no place: raise the groups' maxReplicas")
    return problems


def _describe(deployment: Any) -> str:
    options = deployment.ray_actor_options
    return f"{options['num_gpus']:g} GPUs, {options['num_cpus']:g} CPUs, labels {options.get('label_selector', {})}"


@pytest.mark.parametrize("name", PROFILES)
def test_ray_accepts_the_serve_config(name: str) -> None:
    service = rayservice(profile(name))
    schema = ServeDeploySchema.model_validate(serve_config(service))
    assert [application.import_path for application in schema.applications] == ["deployments.build:build"]
    assert schema.http_options.host == "0.0.0.0"
    assert schema.http_options.port == 8000
    assert service["spec"]["serveConfigV2"] == (CLUSTER / "profiles" / name / "serve_config.yaml").read_text()


def test_the_profiles_are_those_of_the_table() -> None:
    assert set(PROFILES) == set(MODELS)


@pytest.mark.parametrize("name", PROFILES)
def test_baton_accepts_the_configuration(name: str) -> None:
    config = config_of(name)
    check_autoscaling(config)
    assert check(config, []) == "cuda"
    assert config.frontend.metrics_port == 9100
    models = {
        model.name: (
            model.engine,
            model.prefill.tensor_parallel_size if model.prefill else 0,
            model.decode.tensor_parallel_size,
        )
        for model in config.models
    }
    assert models == MODELS[name]
    assert all(model.name == model.source for model in config.models)


ASK_VLLM = """
import json, sys
from app.config import parse
from app.errors import ConfigError
from app.preflight import check_with_vllm
for args in json.load(sys.stdin):
    try:
        check_with_vllm(parse(args), "cuda")
    except ConfigError as error:
        print("answer:", error)
    else:
        print("answer: ok")
"""


@pytest.fixture(scope="module")
def answers_of_vllm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What vLLM says of each profile, and of one with a misspelt argument: asked as `baton check` does, in a process of
    its own.  A model that is on this disk stands for the profiles' own, whose files are on the hub."""
    model = tmp_path_factory.mktemp("model") / "tiny"
    shutil.copytree(ensure_tiny_model(), model)
    description = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**description, "max_position_embeddings": 131072}))
    configs = {name: serve_config(rayservice(profile(name)))["applications"][0]["args"] for name in PROFILES}
    configs["misspelt"] = copy.deepcopy(configs["vllm-disaggregated-default"])
    configs["misspelt"]["models"][0]["engine_args"]["max_modellen"] = 1
    for config in configs.values():
        for each in config["models"]:
            each["source"] = str(model)
    answer = subprocess.run(
        [sys.executable, "-c", ASK_VLLM],
        input=json.dumps(list(configs.values())),
        capture_output=True,
        text=True,
        check=True,
    )
    answers = [line.removeprefix("answer: ") for line in answer.stdout.splitlines() if line.startswith("answer: ")]
    return dict(zip(configs, answers, strict=True))


@pytest.mark.parametrize("name", PROFILES)
def test_vllm_accepts_the_arguments_of_its_engines_and_its_server(name: str, answers_of_vllm: dict[str, str]) -> None:
    """Its server is every engine's; the engines' own settings it checks where there is a GPU."""
    assert answers_of_vllm[name] == "ok"


def test_an_argument_that_vllm_does_not_know_is_named(answers_of_vllm: dict[str, str]) -> None:
    assert answers_of_vllm["misspelt"].startswith("models.0.engine_args.max_modellen: ")


@pytest.mark.parametrize("name", [name for name in PROFILES if "sglang" in name or name == "multi-model"])
def test_sglang_knows_its_arguments(name: str) -> None:
    check_with_sglang(config_of(name))


def test_vllm_knows_the_reasoning_parsers() -> None:
    """It looks for them when the first request comes."""
    from vllm.reasoning import ReasoningParserManager

    wanted = {model.server_args.get("reasoning_parser") for name in PROFILES for model in config_of(name).models}
    assert wanted - {None} <= set(ReasoningParserManager.list_registered())


@pytest.mark.parametrize("name", PROFILES)
def test_every_replica_finds_a_place_in_its_group(name: str) -> None:
    assert unplaceable(rayservice(profile(name))) == []


@pytest.mark.parametrize("name", PROFILES)
def test_roles_are_on_groups_of_their_own(name: str) -> None:
    """But where prefill and decode share pods for NVLink's sake; the head has room for none of them."""
    service = rayservice(profile(name))
    for deployment, found in deployments(service).items():
        group = found.ray_actor_options["label_selector"]["baton/group"]
        role = {"ledger": "frontend"}.get(deployment, deployment.split("-")[0])
        assert group.split("-")[0] == role or (name.endswith("nvlink") and group == "engines")
    head = groups(service)["head"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert "labels" not in head


@pytest.mark.parametrize("name", PROFILES)
def test_a_pod_holds_one_replica_and_gives_ray_no_more_than_it_has(name: str) -> None:
    service = rayservice(profile(name))
    found = groups(service)
    for deployment in deployments(service).values():
        options = deployment.ray_actor_options
        group = found[options["label_selector"]["baton/group"]]
        requests = group["template"]["spec"]["containers"][0]["resources"]["requests"]
        assert group["rayStartParams"]["num-cpus"] == requests["cpu"]
        assert group["rayStartParams"]["num-gpus"] == requests.get("nvidia.com/gpu", "0")
        per_pod = float(requests.get("nvidia.com/gpu", 0)) / options["num_gpus"] if options["num_gpus"] else 1
        assert per_pod == (2 if name.endswith("nvlink") and options["num_gpus"] else 1)
    frontend = deployments(service)["frontend"].ray_actor_options
    assert str(frontend["num_cpus"]).removesuffix(".0") == found["frontend"]["rayStartParams"]["num-cpus"]


@pytest.mark.parametrize("name", PROFILES)
def test_replicas_may_drain_before_their_pod_goes(name: str) -> None:
    service = rayservice(profile(name))
    spec = service["spec"]["rayClusterConfig"]
    for deployment in deployments(service).values():
        drains_s = deployment._deployment_config.graceful_shutdown_timeout_s
        group = groups(service)[deployment.ray_actor_options["label_selector"]["baton/group"]]
        assert group["template"]["spec"]["terminationGracePeriodSeconds"] > drains_s
        assert spec["autoscalerOptions"]["idleTimeoutSeconds"] > drains_s
        assert service["spec"]["rayClusterDeletionDelaySeconds"] > drains_s


@pytest.mark.parametrize("component", ["efa", "one-node", "model-cache-efs", "no-karpenter"])
def test_components_leave_every_replica_its_place(tmp_path: Path, component: str) -> None:
    assert unplaceable(rayservice(with_components(tmp_path, "sglang-disaggregated-70b", (component,)))) == []


# Broken on purpose.


def changed(name: str, old: str, new: str, tmp_path: Path) -> Object:
    """A profile whose Serve config has one text replaced."""
    shutil.copytree(CLUSTER, tmp_path / "cluster", ignore=shutil.ignore_patterns("locks", "monitoring"))
    path = tmp_path / "cluster/profiles" / name / "serve_config.yaml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return rayservice(render(path.parent))


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (
            "tensor_parallel_size: 4",
            "tensor_parallel_size: 8",
            "no worker group has a place for a replica: 8 GPUs, 64 CPUs, labels {'baton/group': 'decode'}",
        ),
        (
            "baton/group: decode",
            "baton/group: decoed",
            "no worker group has a place for a replica: 4 GPUs, 64 CPUs, labels {'baton/group': 'decoed'}",
        ),
        (
            "node_labels: { baton/group: decode }",
            "node_labels: {}",
            "lands on group",
        ),
        (
            "max_replicas: 4",
            "max_replicas: 6",
            "at max_replicas 4 replicas find no place: raise the groups' maxReplicas",
        ),
    ],
    ids=["GPUs that no pod has", "misspelt label", "no label", "more replicas than pods"],
)
def test_a_replica_that_could_never_be_placed_is_named(tmp_path: Path, old: str, new: str, says: str) -> None:
    found = unplaceable(changed("sglang-disaggregated-70b", old, new, tmp_path))
    assert says in "\n".join(found)
    if "max_replicas" not in old:
        assert "decode-nvidia-Llama-3.3-70B-Instruct-FP8: " in "\n".join(found)


def test_a_misspelt_field_of_the_serve_config_is_named(tmp_path: Path) -> None:
    service = changed("sglang-disaggregated-70b", "tensor_parallel_size", "tensor_paralel_size", tmp_path)
    with pytest.raises(ConfigError) as caught:
        deployments(service)
    assert caught.value.field == "models.0.prefill.tensor_paralel_size"


def test_an_argument_that_sglang_does_not_know_is_named(tmp_path: Path) -> None:
    service = changed("sglang-disaggregated-70b", "page_size", "pagesize", tmp_path)
    with pytest.raises(ConfigError) as caught:
        check_with_sglang(parse(serve_config(service)["applications"][0]["args"]))
    assert caught.value.field == "models.0.engine_args.pagesize"
