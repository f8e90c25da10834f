"""What kustomize makes of cluster/ is what an API server takes, and keeps to what KubeRay and Baton rely on."""

from __future__ import annotations

import copy
import functools
import shutil
from collections.abc import Iterator
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.cluster import RAY_FLAGS
from tests.cluster import manifests
from tests.cluster.manifests import CLUSTER, Object, kustomize, load, render, validate

PROFILES = sorted(path.parent.name for path in CLUSTER.glob("profiles/*/kustomization.yaml"))
APART = [name for name in PROFILES if "disaggregated" in name and not name.endswith("nvlink")]
COMBINATIONS: list[tuple[str, tuple[str, ...]]] = [
    *((name, ("no-karpenter", "gateway-api")) for name in PROFILES),
    *((name, ("model-cache-efs", "redis-external", "ingress-alb")) for name in PROFILES),
    *((name, ("one-node",)) for name in APART),
    ("sglang-disaggregated-70b", ("efa", "one-node", "model-cache-efs", "ingress-alb")),
    ("vllm-disaggregated-70b", ("efa", "gateway-api", "no-karpenter")),
]


@functools.cache
def profile(name: str) -> list[Object]:
    """A rendered profile; not to be changed."""
    return render(CLUSTER / "profiles" / name)


def of_kind(objects: list[Object], kind: str) -> list[Object]:
    return [thing for thing in objects if thing["kind"] == kind]


def rayservice(objects: list[Object]) -> Object:
    (found,) = of_kind(objects, "RayService")
    return found


def groups(service: Object) -> dict[str, Object]:
    """The worker groups by name, and the head."""
    cluster = service["spec"]["rayClusterConfig"]
    return {group["groupName"]: group for group in cluster["workerGroupSpecs"]} | {"head": cluster["headGroupSpec"]}


def pods(objects: list[Object]) -> dict[str, Object]:
    """Every pod template of a profile by its ``baton.io/group``: the groups' and Redis'."""
    templates = [group["template"] for group in groups(rayservice(objects)).values()]
    templates += [stateful["spec"]["template"] for stateful in of_kind(objects, "StatefulSet")]
    return {template["metadata"]["labels"]["baton.io/group"]: template for template in templates}


def with_components(folder: Path, name: str, components: tuple[str, ...], namespace: str = "baton") -> list[Object]:
    """A profile with components over it, in `folder`, as deploy.sh makes it."""
    shutil.copytree(CLUSTER, folder / "cluster", ignore=shutil.ignore_patterns("locks", "monitoring"))
    overlay = folder / "overlay"
    overlay.mkdir()
    listed = "".join(f"  - ../cluster/components/{component}\n" for component in components)
    text = f"namespace: {namespace}\nresources:\n  - ../cluster/profiles/{name}\n"
    (overlay / "kustomization.yaml").write_text(text + (f"components:\n{listed}" if listed else ""))
    return render(overlay)


def strings(thing: Any) -> Iterator[str]:
    if isinstance(thing, dict):
        for key, value in thing.items():
            yield str(key)
            yield from strings(value)
    elif isinstance(thing, list):
        for value in thing:
            yield from strings(value)
    else:
        yield str(thing)


def problems(objects: list[Object]) -> list[str]:
    return [problem for thing in objects for problem in validate(thing)]


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_is_valid(name: str) -> None:
    assert problems(profile(name)) == []


@pytest.mark.parametrize(("name", "components"), COMBINATIONS, ids=[f"{n}+{'+'.join(c)}" for n, c in COMBINATIONS])
def test_a_profile_with_components_is_valid(tmp_path: Path, name: str, components: tuple[str, ...]) -> None:
    objects = with_components(tmp_path, name, components)
    assert problems(objects) == []
    assert not [text for text in strings(objects) if "PROFILE" in text]


def test_karpenters_objects_are_valid_and_have_the_names_that_pods_ask_for() -> None:
    objects = render(CLUSTER / "karpenter")
    assert problems(objects) == []
    pools = {pool["metadata"]["name"]: pool for pool in of_kind(objects, "NodePool")}
    wanted = {
        pod["spec"]["nodeSelector"]["karpenter.sh/nodepool"]
        for name in PROFILES
        for pod in pods(profile(name)).values()
    }
    assert wanted == set(pools) == {"cpu-karpenter", "g5-gpu-karpenter", "g6-gpu-karpenter", "p5-gpu-karpenter"}
    classes = {each["metadata"]["name"] for each in of_kind(objects, "EC2NodeClass")}
    assert {pool["spec"]["template"]["spec"]["nodeClassRef"]["name"] for pool in pools.values()} == classes


def test_the_clusters_name_and_role_stand_in_one_place() -> None:
    text = kustomize(CLUSTER / "karpenter")
    assert "CLUSTER_NAME" in text
    files = [path.name for path in (CLUSTER / "karpenter").glob("*.yaml") if "CLUSTER_NAME" in path.read_text()]
    assert files == ["kustomization.yaml"]


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_is_named_by_its_folder_and_leaves_other_services_alone(name: str) -> None:
    objects = profile(name)
    assert rayservice(objects)["metadata"]["name"] == name
    assert not [text for text in strings(objects) if "PROFILE" in text]
    shared = {("Namespace", "baton"), ("ConfigMap", "baton-environment")}
    own = [thing for thing in objects if (thing["kind"], thing["metadata"]["name"]) not in shared]
    assert all(thing["metadata"]["labels"]["baton.io/service"] == name for thing in own)
    assert all(thing["metadata"]["name"].startswith(name) for thing in own)
    assert all(pod["metadata"]["labels"]["baton.io/service"] == name for pod in pods(objects).values())
    # KubeRay refuses longer ones: it makes others out of them.
    assert len(name) <= 47


def test_the_namespace_is_said_by_kustomize_alone(tmp_path: Path) -> None:
    objects = with_components(tmp_path, PROFILES[0], ("ingress-alb", "gateway-api"), namespace="another")
    namespaces = {thing["metadata"].get("namespace") for thing in objects if thing["kind"] != "Namespace"}
    assert namespaces == {"another"}
    assert [thing["metadata"]["name"] for thing in of_kind(objects, "Namespace")] == ["another"]
    assert "baton" not in set(strings([thing["spec"] for thing in objects if "spec" in thing]))


def test_the_environment_is_that_of_baton_run() -> None:
    (environment,) = of_kind(profile(PROFILES[0]), "ConfigMap")
    own = {
        "BATON_HAPROXY_PROBE_PORT",
        "HF_HOME",
        "HOME",
        "RAY_SERVE_HAPROXY_BINARY_PATH",
        "RAY_SERVE_HAPROXY_METRICS_PORT",
        "RAY_SERVE_HAPROXY_STATS_PORT",
    }
    assert {name: value for name, value in environment["data"].items() if name not in own} == RAY_FLAGS
    assert own < set(environment["data"])


@pytest.mark.parametrize("name", PROFILES)
def test_every_pod_meets_the_restricted_standard(name: str) -> None:
    """As far as the API server's admission looks at what stands here."""
    for pod in pods(profile(name)).values():
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"]
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        for container in spec["containers"]:
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert context["readOnlyRootFilesystem"] is True
            assert not [port for port in container["ports"] if "hostPort" in port]
        kinds = {kind for volume in spec.get("volumes", []) for kind in volume} - {"name"}
        assert kinds <= {"emptyDir", "persistentVolumeClaim", "configMap", "secret", "projected", "ephemeral"}
    autoscaler = rayservice(profile(name))["spec"]["rayClusterConfig"]["autoscalerOptions"]
    assert autoscaler["securityContext"]["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize("name", PROFILES)
def test_only_the_head_gets_a_token_of_kubernetes(name: str) -> None:
    mounts = {group: pod["spec"].get("automountServiceAccountToken") for group, pod in pods(profile(name)).items()}
    assert mounts.pop("head") is None
    assert set(mounts.values()) == {False}


@pytest.mark.parametrize("name", PROFILES)
def test_ports_have_the_names_that_services_and_monitors_select(name: str) -> None:
    found = pods(profile(name))
    del found["redis"]
    for group, pod in found.items():
        ports = {port["name"]: port["containerPort"] for port in pod["spec"]["containers"][0]["ports"]}
        assert ports["metrics"] == 8080
        assert ports["serve"] == 8000
        assert ports.get("baton-metrics") == (9100 if group == "frontend" else None)


@pytest.mark.parametrize("name", PROFILES)
def test_each_group_but_the_head_has_a_disruption_budget(name: str) -> None:
    """By an integer: RayCluster has no scale subresource, so a percentage or maxUnavailable blocks every eviction."""
    objects = profile(name)
    budgets = of_kind(objects, "PodDisruptionBudget")
    selected = [budget["spec"]["selector"]["matchLabels"] for budget in budgets]
    assert {labels["baton.io/service"] for labels in selected} == {name}
    assert {labels["baton.io/group"] for labels in selected} == set(groups(rayservice(objects))) - {"head"}
    assert all("maxUnavailable" not in budget["spec"] for budget in budgets)
    assert all(isinstance(budget["spec"]["minAvailable"], int) for budget in budgets)


LOAD_S = 1200
"""What a large model takes until it serves."""


def graceful_shutdown_s(name: str) -> list[float]:
    """Those of a profile's deployments."""
    (document,) = load((CLUSTER / "profiles" / name / "serve_config.yaml").read_text())
    args = document["applications"][0]["args"]
    pools = [model[role] for model in args["models"] for role in ("prefill", "decode") if role in model]
    return [pool["graceful_shutdown_timeout_s"] for pool in [args["frontend"], *pools]]


@pytest.mark.parametrize("name", PROFILES)
def test_a_pod_lives_longer_than_it_drains(name: str) -> None:
    for group, pod in pods(profile(name)).items():
        if group in ("head", "redis"):
            continue
        drain = " ".join(pod["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"])
        deadline_s = int(drain.partition("--deadline-remaining-seconds ")[2].split()[0])
        # Serve stops a replica so long before the deadline, and its successor loads a model first.
        assert deadline_s >= LOAD_S + max(graceful_shutdown_s(name))
        assert pod["spec"]["terminationGracePeriodSeconds"] > deadline_s


@pytest.mark.parametrize("name", PROFILES)
def test_a_model_that_loads_for_20_minutes_is_not_killed(name: str) -> None:
    """The probes that may kill look at Ray's node process; none at a replica, an application or HAProxy."""
    for group, pod in pods(profile(name)).items():
        if group == "redis":
            continue
        (container,) = pod["spec"]["containers"]
        assert container["livenessProbe"]["httpGet"]["port"] == 52365
        assert "startupProbe" not in container


@pytest.mark.parametrize("name", PROFILES)
def test_readiness_is_asked_where_clients_cannot_take_all_connections(name: str) -> None:
    (environment,) = of_kind(profile(name), "ConfigMap")
    for group in pods(profile(name)).keys() - {"head", "redis"}:
        (container,) = pods(profile(name))[group]["spec"]["containers"]
        probe = container["readinessProbe"]["httpGet"]
        assert probe == {"path": "/-/healthz", "port": int(environment["data"]["BATON_HAPROXY_PROBE_PORT"])}


@pytest.mark.parametrize("name", APART)
def test_prefill_and_decode_share_a_zone(name: str) -> None:
    for group in ("prefill", "decode"):
        pod = pods(profile(name))[group]
        (term,) = pod["spec"]["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        assert term["topologyKey"] == "topology.kubernetes.io/zone"
        labels = term["labelSelector"]["matchLabels"]
        assert labels == {"baton.io/kv": name}
        assert pod["metadata"]["labels"]["baton.io/kv"] == name


def openings(objects: list[Object]) -> dict[str, list[tuple[Object, Object]]]:
    """For each NetworkPolicy who may connect to which port of the pods that it selects; ``{}`` stands for all."""
    return {
        policy["metadata"]["name"]: [
            (peer, port)
            for rule in policy["spec"]["ingress"]
            for peer in rule.get("from") or [{}]
            for port in rule.get("ports") or [{}]
        ]
        for policy in of_kind(objects, "NetworkPolicy")
    }


def namespace(label: str, value: str) -> Object:
    """The peer of a NetworkPolicy that stands for all pods of the namespaces with a label."""
    return {"namespaceSelector": {"matchLabels": {label: value}}}


@pytest.mark.parametrize("name", PROFILES)
def test_a_port_is_open_to_the_service_alone_or_says_to_whom_else(name: str) -> None:
    """Ray's ports, channels, side channels, SGLang's bootstrap and UCX's are for the service's own pods."""
    own = {"matchLabels": {"baton.io/service": name}}
    monitoring = namespace("kubernetes.io/metadata.name", "monitoring")
    assert openings(profile(name)) == {
        f"{name}-inside": [({"podSelector": own}, {}), (monitoring, {"port": 8080}), (monitoring, {"port": 9100})],
        f"{name}-requests": [(namespace("baton.io/client", "true"), {"port": 8000})],
        f"{name}-dashboard": [(namespace("kubernetes.io/metadata.name", "kuberay-system"), {"port": 8265})],
    }


@pytest.mark.parametrize("name", PROFILES)
def test_what_no_policy_opens_is_closed(name: str) -> None:
    """A policy of both types selects all pods; the others add what they open to the pods that need it."""
    policies = {policy["metadata"]["name"]: policy["spec"] for policy in of_kind(profile(name), "NetworkPolicy")}
    selected = {"baton.io/service": name}
    assert policies[f"{name}-inside"]["podSelector"] == {"matchLabels": selected}
    assert sorted(policies[f"{name}-inside"]["policyTypes"]) == ["Egress", "Ingress"]
    no_frontend = {"key": "baton.io/group", "operator": "NotIn", "values": ["head", "redis"]}
    assert policies[f"{name}-requests"]["podSelector"] == {"matchLabels": selected, "matchExpressions": [no_frontend]}
    assert policies[f"{name}-dashboard"]["podSelector"] == {"matchLabels": {**selected, "baton.io/group": "head"}}


@pytest.mark.parametrize("name", PROFILES)
def test_the_services_own_namespace_may_send_requests(name: str) -> None:
    """A gateway of Istio's is there."""
    (namespace,) = of_kind(profile(name), "Namespace")
    assert namespace["metadata"]["labels"]["baton.io/client"] == "true"


@pytest.mark.parametrize("name", PROFILES)
def test_for_a_load_balancer_the_port_of_requests_is_open_to_private_addresses(name: str, tmp_path: Path) -> None:
    requests, before = f"{name}-requests", openings(profile(name))
    after = openings(with_components(tmp_path, name, ("ingress-alb",)))
    assert after == {**before, requests: after[requests]}
    added = after[requests][len(before[requests]) :]
    blocks = [ip_network(peer["ipBlock"]["cidr"]) for peer, port in added if port == {"port": 8000}]
    assert len(blocks) == len(added) > 0
    assert all(block.is_private and block.prefixlen > 0 for block in blocks)


def test_the_load_balancer_reaches_the_serve_service_alone(tmp_path: Path) -> None:
    name = "multi-model"
    objects = with_components(tmp_path, name, ("ingress-alb", "gateway-api"))
    (ingress,) = of_kind(objects, "Ingress")
    backends = [path["backend"] for rule in ingress["spec"]["rules"] for path in rule["http"]["paths"]]
    assert backends == [{"service": {"name": f"{name}-serve-svc", "port": {"number": 8000}}}]
    routes = [rule for route in of_kind(objects, "HTTPRoute") for rule in route["spec"]["rules"]]
    references = [reference for rule in routes for reference in rule.get("backendRefs", [])]
    assert references == [{"name": f"{name}-serve-svc", "port": 8000}]


@pytest.mark.parametrize("name", PROFILES)
def test_secrets_are_required_and_are_those_that_the_documentation_names(name: str) -> None:
    wanted = {("hf-token", "token"), ("baton-redis", "password"), ("baton-keys", "keys.yaml")}
    assert set(secrets(profile(name))) == wanted


def secrets(thing: Any) -> Iterator[tuple[str, str]]:
    """Every Secret's name and key that an object takes; fails on one that may be missing."""
    if isinstance(thing, list):
        for each in thing:
            yield from secrets(each)
    elif isinstance(thing, dict):
        if reference := thing.get("secretKeyRef"):
            assert not reference.get("optional"), f"{reference['name']} is optional: a pod would start without it"
            yield reference["name"], reference["key"]
        if volume := thing.get("secret"):
            assert not volume.get("optional"), f"{volume['secretName']} is optional: a pod would start without it"
            yield from ((volume["secretName"], item["key"]) for item in volume["items"])
        for each in thing.values():
            yield from secrets(each)


@pytest.mark.parametrize("name", PROFILES)
def test_only_frontends_have_the_file_of_keys_that_the_serve_config_names(name: str) -> None:
    (service,) = of_kind(profile(name), "RayService")
    spec = service["spec"]["rayClusterConfig"]
    groups = {"head": spec["headGroupSpec"], **{group["groupName"]: group for group in spec["workerGroupSpecs"]}}
    found = {
        f"{mount['mountPath']}/{item['path']}": name
        for name, group in groups.items()
        for volume in group["template"]["spec"]["volumes"]
        for item in volume.get("secret", {}).get("items", [])
        for container in group["template"]["spec"]["containers"]
        for mount in container["volumeMounts"]
        if mount["name"] == volume["name"]
    }
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    assert found == {application["args"]["security"]["keys"]: "frontend"}


# Broken on purpose: what the checks above say of it.


def broken(change: str, instead: str, tmp_path: Path) -> list[Object]:
    """A profile whose base has one text replaced."""
    shutil.copytree(CLUSTER, tmp_path / "cluster", ignore=shutil.ignore_patterns("locks", "monitoring"))
    path = tmp_path / "cluster/base/rayservice.yaml"
    text = path.read_text()
    assert change in text
    path.write_text(text.replace(change, instead))
    return render(tmp_path / "cluster/profiles/vllm-disaggregated-default")


@pytest.mark.parametrize(
    ("change", "instead", "says"),
    [
        (
            "enableInTreeAutoscaling: true",
            "enableInTreeAutoscalling: true",
            "spec.rayClusterConfig: unknown field enableInTreeAutoscalling",
        ),
        (
            "automountServiceAccountToken: false",
            "automountServiceAccountTokn: false",
            "spec.rayClusterConfig.workerGroupSpecs[0].template.spec: unknown field automountServiceAccountTokn",
        ),
        ("maxReplicas: 4", 'maxReplicas: "4"', "workerGroupSpecs[0].maxReplicas: '4' is not of type 'integer'"),
        ("version: v2", "version: v3", "autoscalerOptions.version: 'v3' is not one of ['v1', 'v2']"),
        (
            "{ name: metrics, containerPort: 8080 }",
            "{ name: metrics, containerPort: 8000 }",
            "containers[0].ports: there twice: {'containerPort': 8000, 'protocol': None}",
        ),
        ("memory: 26Gi,", "memory: 26GiB,", "'26GiB' does not match"),
    ],
    ids=["field", "field of a pod", "type", "enumeration", "port twice", "quantity"],
)
def test_a_mistake_in_the_rayservice_is_named(tmp_path: Path, change: str, instead: str, says: str) -> None:
    found = problems(broken(change, instead, tmp_path))
    assert found
    assert says in "\n".join(found)
    assert all(problem.startswith("RayService vllm-disaggregated-default: ") for problem in found)


@pytest.mark.parametrize("kind", ["Namespace", "NetworkPolicy", "PodDisruptionBudget", "StatefulSet", "Service"])
def test_an_unknown_field_of_any_other_object_is_named(kind: str) -> None:
    thing = copy.deepcopy(of_kind(profile(PROFILES[0]), kind)[0])
    thing["metadata"]["lables"] = {}
    assert validate(thing) == [f"{kind} {thing['metadata']['name']}: metadata: unknown field lables"]


def test_an_unknown_field_of_karpenters_objects_is_named() -> None:
    pool = copy.deepcopy(of_kind(render(CLUSTER / "karpenter"), "NodePool")[0])
    pool["spec"]["disruption"]["consolidateAfterwards"] = "5m"
    assert validate(pool) == [
        f"NodePool {pool['metadata']['name']}: spec.disruption: unknown field consolidateAfterwards"
    ]


def test_an_unknown_kind_is_named() -> None:
    assert validate({"apiVersion": "apps/v1", "kind": "Deploymnt", "metadata": {"name": "a"}}) == [
        "Deploymnt a: no schema of apps/v1 Deploymnt in tests/cluster/schemas"
    ]


def test_a_secret_that_may_be_missing_is_named(tmp_path: Path) -> None:
    optional = broken("name: hf-token, key: token", "name: hf-token, key: token, optional: true", tmp_path)
    with pytest.raises(AssertionError, match="hf-token is optional"):
        list(secrets(optional))


def test_without_kubectl_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(pytest.fail.Exception, match=r"^kubectl is not installed.*: install it \(1.30 or newer"):
        manifests.render(CLUSTER / "base")


def test_what_kustomize_refuses_is_said(tmp_path: Path) -> None:
    (tmp_path / "kustomization.yaml").write_text("resources: [missing.yaml]\n")
    with pytest.raises(pytest.fail.Exception, match=r"missing.yaml"):
        render(tmp_path)


def test_empty_documents_are_no_objects() -> None:
    assert load("---\n---\nkind: A\n") == [{"kind": "A"}]
