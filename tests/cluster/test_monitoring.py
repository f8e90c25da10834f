"""Alerts, dashboards and scrapes ask for what a running Baton exports, and for nothing else."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from app.ports import free_port
from cluster.monitoring import dashboards
from tests.cluster import promql
from tests.cluster.manifests import CLUSTER, Object, render, validate
from tests.conftest import REPOSITORY, wait_until

MONITORING = CLUSTER / "monitoring"
RUNBOOKS = REPOSITORY / "docs" / "runbooks.md"
OF_TARGETS = frozenset({"namespace", "pod", "container", "endpoint", "instance"})
"""Labels that the Prometheus operator gives each target, besides those that the PodMonitor adds."""

NUM_REQUESTS = 12


@pytest.fixture(scope="module")
def objects() -> dict[str, list[Object]]:
    """The rendered objects by kind."""
    by_kind = defaultdict(list)
    for thing in render(MONITORING):
        by_kind[thing["kind"]].append(thing)
    return by_kind


@pytest.fixture(scope="module")
def rules(objects: dict[str, list[Object]]) -> list[Object]:
    (rule,) = objects["PrometheusRule"]
    return [each for group in rule["spec"]["groups"] for each in group["rules"]]


@pytest.fixture(scope="module")
def panels(objects: dict[str, list[Object]]) -> list[Object]:
    found = []
    for config_map in objects["ConfigMap"]:
        (text,) = config_map["data"].values()
        dashboard = json.loads(text)
        found += [{**panel, "dashboard": dashboard["title"]} for panel in dashboard["panels"]]
    return found


def alerts_of(rules: list[Object]) -> list[Object]:
    return [rule for rule in rules if "alert" in rule]


# --- what needs no running Baton


def test_all_objects_are_what_their_definitions_say(objects: dict[str, list[Object]]) -> None:
    assert {kind: len(things) for kind, things in objects.items()} == {
        "ConfigMap": len(dashboards.DASHBOARDS),
        "PodMonitor": 1,
        "PrometheusRule": 1,
    }
    assert [problem for things in objects.values() for thing in things for problem in validate(thing)] == []


@pytest.mark.parametrize("profile", [path.name for path in sorted((CLUSTER / "profiles").iterdir())])
def test_all_pods_of_a_profile_are_scraped(profile: str, objects: dict[str, list[Object]]) -> None:
    (monitor,) = objects["PodMonitor"]
    of_ray, of_frontend = (endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"])
    (service,) = (thing for thing in render(CLUSTER / "profiles" / profile) if thing["kind"] == "RayService")
    cluster = service["spec"]["rayClusterConfig"]
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    for pod in [cluster["headGroupSpec"]["template"], *(group["template"] for group in cluster["workerGroupSpecs"])]:
        labels = pod["metadata"]["labels"]
        assert labels["baton.io/service"] == service["metadata"]["name"]
        group = labels["baton.io/group"]
        ports = {each["name"]: each["containerPort"] for box in pod["spec"]["containers"] for each in box["ports"]}
        assert of_ray in ports, group
        frontend_port = application["args"]["frontend"]["metrics_port"] if group == "frontend" else None
        assert ports.get(of_frontend) == frontend_port, group


def test_the_dashboards_are_what_the_script_writes(objects: dict[str, list[Object]]) -> None:
    loaded: dict[str, str] = {}
    for config_map in objects["ConfigMap"]:
        assert config_map["metadata"]["labels"]["grafana_dashboard"] == "1"
        loaded |= config_map["data"]
    assert sorted(loaded) == sorted(f"{name}.json" for name in dashboards.DASHBOARDS)
    for name in dashboards.DASHBOARDS:
        written = json.loads(loaded[f"{name}.json"])
        assert written == dashboards.dashboard(name), f"{name}.json: run python cluster/monitoring/dashboards.py"


def test_panels_explain_themselves_and_do_not_overlap(panels: list[Object]) -> None:
    for panel in panels:
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= dashboards.COLUMNS, panel["title"]
        if panel["type"] != "row":
            assert panel["description"].endswith("."), panel["title"]
            assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
    for one, other in combinations(panels, 2):
        if one["dashboard"] == other["dashboard"]:
            assert one["id"] != other["id"]
            assert not overlap(one["gridPos"], other["gridPos"]), f"{one['title']} and {other['title']}"


def overlap(one: dict[str, int], other: dict[str, int]) -> bool:
    return all(
        one[start] < other[start] + other[size] and other[start] < one[start] + one[size]
        for start, size in (("x", "w"), ("y", "h"))
    )


def test_every_alert_has_a_runbook_and_every_runbook_an_alert(rules: list[Object]) -> None:
    sections = re.findall(r"^## (Baton\w+)$", RUNBOOKS.read_text(), flags=re.MULTILINE)
    alerts = alerts_of(rules)
    assert sorted(sections) == sorted({alert["alert"] for alert in alerts})
    for alert in alerts:
        assert alert["labels"]["severity"] in ("critical", "warning"), alert["alert"]
        assert alert["annotations"]["runbook_url"] == f"docs/runbooks.md#{alert['alert'].lower()}"
        assert {"summary", "description"} <= set(alert["annotations"]), alert["alert"]
        # Its two windows are what keeps that one from firing at once.
        assert "for" in alert or alert["alert"] == "BatonGoodputUnderSlo"


def test_alerts_on_transports_know_the_lanes_that_ucx_has_for_rdma_and_nvlink(rules: list[Object]) -> None:
    from app.engines.ucx import LANES_BY_REQUIREMENT

    by_regex = [
        matcher.value
        for rule in rules
        for selector in promql.selectors(rule["expr"])
        for matcher in selector.matchers.matchers
        if matcher.name == "transport" and matcher.value
    ]
    assert len(by_regex) == 2
    (regex,) = set(by_regex)
    fast = {*LANES_BY_REQUIREMENT["rdma"], *LANES_BY_REQUIREMENT["nvlink"]}
    for lane in fast:
        assert re.fullmatch(regex, f"inter-node {lane}_mlx5/mlx5_0:1 (zero-copy)"), lane
    for lane in {lane for lanes in LANES_BY_REQUIREMENT.values() for lane in lanes} - fast:
        assert not re.fullmatch(regex, f"intra-node {lane}/lo (zero-copy)"), lane


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)")
def test_alerts_fire_when_they_should(objects: dict[str, list[Object]], tmp_path: Path) -> None:
    (rule,) = objects["PrometheusRule"]
    (tmp_path / "alerts.yaml").write_text(yaml.safe_dump(rule["spec"]))
    shutil.copy(Path(__file__).parent / "alerts.test.yaml", tmp_path)
    answer = subprocess.run(
        ["promtool", "test", "rules", "alerts.test.yaml"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr


@pytest.mark.parametrize(
    ("expression", "mistake"),
    [
        ("rate(ray_baton_typo_total[5m])", "ray_baton_typo_total is not exported"),
        ('used{rol="decode"}', "no label rol in used"),
        ("sum by (model, pool) (used)", "no label pool in sum"),
        ("histogram_quantile(0.5, sum by (model) (used))", "no label le in histogram_quantile"),
        ("sum by (model) (used) / sum by (model, role) (used)", "never match, only one has role"),
        ("used and on (model, pool) used", "no label pool in used and"),
        ("sum(used) + deriv(sum by (model) (used)[5m:1m])", "never match, only one has model"),
    ],
)
def test_a_mistake_in_an_expression_is_found(expression: str, mistake: str) -> None:
    with pytest.raises(promql.Mistake, match=mistake):
        promql.labels(expression, {"used": frozenset({"model", "role"})})


# --- what a running Baton exports


class Scrape(NamedTuple):
    url: str
    ray_url: str
    frontend_urls: list[str]


@pytest.fixture(scope="module")
def running(serve_url: str) -> Iterator[Scrape]:
    """Prefill and decode apart on sim engines, decode autoscaled, two frontends; and a few requests to it."""
    import ray
    from ray import serve

    from deployments.build import build

    first_port = free_port()
    serve.run(build(arguments(first_port)), name="monitored", route_prefix="/monitored")
    url = f"{serve_url}/monitored"
    wait_until(lambda: httpx.get(f"{url}/health").json()["status"] == "healthy", 30, "both pools ready")
    for number in range(NUM_REQUESTS):
        prompt = list(range(300 + number, 400 + number))
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 8, "ignore_eos": True}
        httpx.post(f"{url}/v1/completions", json=body).raise_for_status()
    (node,) = ray.nodes()
    candidates = [f"http://127.0.0.1:{port}/metrics" for port in range(first_port, first_port + 20)]
    yield Scrape(
        url=url,
        ray_url=f"http://127.0.0.1:{node['MetricsExportPort']}/metrics",
        frontend_urls=[candidate for candidate in candidates if "baton_sequences" in text_at(candidate)],
    )
    serve.delete("monitored")


def arguments(metrics_port: int) -> dict[str, Any]:
    pool = {"engine": "sim", "resources": {"num_cpus": 0.1}}
    return {
        "models": [
            {
                "name": "tiny",
                "source": "baton:tiny",
                "engine_args": {"max_model_len": 2048, "num_blocks": 512, "speed_up": "max"},
                "prefill": pool,
                "decode": {**pool, "autoscaling": {"min_replicas": 1, "max_replicas": 2}},
                "routing": {"placement": {"policy": "remote"}},
            }
        ],
        "transfer": {},
        "frontend": {"replicas": 2, "resources": {"num_cpus": 0.1}, "metrics_port": metrics_port},
    }


def text_at(url: str) -> str:
    try:
        return httpx.get(url).text
    except httpx.TransportError:
        return ""


def samples_at(url: str) -> Iterator[Any]:
    for family in text_string_to_metric_families(httpx.get(url).text):
        yield from family.samples


@pytest.fixture(scope="module")
def known(
    running: Scrape, objects: dict[str, list[Object]], rules: list[Object], panels: list[Object]
) -> dict[str, frozenset[str]]:
    """The labels of each metric that Prometheus has: scraped by the PodMonitor, or recorded by the rules.

    Ray exports every few seconds what its processes tell it at that pace, so that all is there takes a while; what is
    not there in the end is for the tests to say.
    """
    (monitor,) = objects["PodMonitor"]
    of_ray, of_frontend = monitor["spec"]["podMetricsEndpoints"]
    expressions = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    needed = {
        selector.name
        for expression in [*map(plain, expressions), *(rule["expr"] for rule in rules)]
        for selector in promql.selectors(expression)
    }
    found: dict[str, frozenset[str]] = {"up": target_labels(of_ray)}
    deadline = time.monotonic() + 60
    while needed - {rule.get("record") for rule in rules} - found.keys() and time.monotonic() < deadline:
        time.sleep(1)
        found |= scraped(running.ray_url, of_ray)
        for url in running.frontend_urls:
            found |= scraped(url, of_frontend)
    for rule in rules:
        if "record" in rule:
            found[rule["record"]] = promql.labels(rule["expr"], found)
    return found


def target_labels(endpoint: Object) -> frozenset[str]:
    return OF_TARGETS | {relabeling["targetLabel"] for relabeling in endpoint["relabelings"]}


def scraped(url: str, endpoint: Object) -> dict[str, frozenset[str]]:
    """What a scrape brings, less what the PodMonitor drops of it."""
    dropped = {each["action"]: each["regex"] for each in endpoint.get("metricRelabelings", [])}
    found = {}
    for sample in samples_at(url):
        if re.fullmatch(dropped.get("drop", ""), sample.name):
            continue
        kept = {label for label in sample.labels if not re.fullmatch(dropped.get("labeldrop", ""), label)}
        found[sample.name] = target_labels(endpoint) | kept
    return found


def plain(expression: str) -> str:
    """A panel's query with Grafana's interval filled in; its other variables stand inside of strings."""
    return expression.replace("$__rate_interval", "5m")


@pytest.mark.serve
def test_rules_ask_for_what_is_exported(known: dict[str, frozenset[str]], rules: list[Object]) -> None:
    for rule in rules:
        labels = promql.labels(rule["expr"], known)
        said = " ".join(rule.get("annotations", {}).values())
        assert set(re.findall(r"\$labels\.(\w+)", said)) <= labels, rule["alert"]


@pytest.mark.serve
def test_panels_ask_for_what_is_exported(known: dict[str, frozenset[str]], panels: list[Object]) -> None:
    for panel in panels:
        for target in panel.get("targets", []):
            labels = promql.labels(plain(target["expr"]), known)
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= labels, panel["title"]


@pytest.mark.serve
def test_variables_ask_for_what_is_exported(known: dict[str, frozenset[str]]) -> None:
    for variable in dashboards.dashboard("overview")["templating"]["list"]:
        if variable["type"] == "query":
            asked = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["definition"])
            assert asked is not None
            assert asked[2] in promql.labels(asked[1], known)


def test_expressions_tell_the_frontends_port_by_its_name(
    objects: dict[str, list[Object]], rules: list[Object], panels: list[Object]
) -> None:
    (monitor,) = objects["PodMonitor"]
    ports = {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]}
    expressions = [plain(target["expr"]) for panel in panels for target in panel.get("targets", [])]
    asked = {
        matcher.value
        for expression in [*expressions, *(rule["expr"] for rule in rules)]
        for selector in promql.selectors(expression)
        for matcher in selector.matchers.matchers
        if matcher.name == "endpoint"
    }
    assert asked == {"baton-metrics"} < ports


@pytest.mark.serve
def test_each_frontend_exports_its_own_counters(running: Scrape) -> None:
    assert len(running.frontend_urls) == 2
    counts = [
        sum(sample.value for sample in samples_at(url) if sample.name == "baton_sequences_total")
        for url in running.frontend_urls
    ]
    assert sum(counts) == NUM_REQUESTS


@pytest.mark.serve
def test_a_replicas_metrics_are_what_its_engine_says(running: Scrape) -> None:
    """Also after it has become idle."""
    (decode,) = (r for r in httpx.get(f"{running.url}/stats").json()["replicas"] if r["role"] == "decode")

    def exported() -> dict[str, float]:
        return {
            sample.name.removeprefix("ray_baton_"): sample.value
            for sample in samples_at(running.ray_url)
            if sample.labels.get("replica") == decode["replica_id"] and sample.name.startswith("ray_baton_")
        }

    num = NUM_REQUESTS + decode["num_probes"]
    moved = wait_until(lambda: (now := exported()).get("kv_transfers_total") == num and now, 40, "transfers")
    assert (decode["num_probes"], moved["link_usable"]) == (3, 1)
    assert moved["kv_transferred_bytes_total"] == decode["transferred_bytes"] > 0
    assert moved["kv_transfer_seconds_total"] == pytest.approx(decode["transfer_s"])
    assert (moved["kv_blocks"], moved["kv_transfer_failures_total"], moved["replica_sequences"]) == (512, 0, 0)
