"""Writes the Grafana dashboards under dashboards/: `python cluster/monitoring/dashboards.py`.

Each is rows of panels, a panel is its title, description, unit and queries.  Everything else that Grafana wants is the
same for all of them, and filled in here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).parent / "dashboards"
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
OF_SERVICE = 'namespace=~"$namespace", service=~"$service"'
OF_MODEL = f'{OF_SERVICE}, model=~"$model"'
COLUMNS, PANEL_WIDTH, PANEL_HEIGHT = 24, 8, 8


class Panel(NamedTuple):
    title: str
    description: str
    unit: str
    queries: dict[str, str]
    """Legend by query."""
    maximum: float | None = None


class Row(NamedTuple):
    title: str
    panels: list[Panel]


def rate(metric: str, by: str, matchers: str = OF_MODEL) -> str:
    return f"sum by ({by}) (rate({metric}{{{matchers}}}[$__rate_interval]))"


def total(metric: str, by: str, matchers: str = OF_MODEL) -> str:
    return f"sum by ({by}) ({metric}{{{matchers}}})"


def quantiles(histogram: str, by: str = "model") -> dict[str, str]:
    rates = rate(f"{histogram}_bucket", f"le, {by}")
    legend = " ".join(f"{{{{{label}}}}}" for label in by.split(", "))
    return {
        f"histogram_quantile({quantile}, {rates})": f"{legend} p{quantile * 100:.0f}" for quantile in (0.5, 0.95, 0.99)
    }


GOOD_AND_BAD = rate("baton_sequences_total", "model", OF_MODEL + ', end!~"cancelled|InvalidRequest|LimitReached"')
GOODPUT = f"{rate('baton_sequences_within_slo_total', 'model')} / {GOOD_AND_BAD}"
QUEUED_TOKENS = total("ray_baton_queued_prompt_tokens", "model, role")
CACHED, EXPECTED_CACHED, PROMPT_TOKENS = (
    rate(f"baton_{name}_total", "model") for name in ("cached_prompt_tokens", "expected_cached_tokens", "prompt_tokens")
)
READY = total("ray_serve_deployment_replica_healthy", "deployment", OF_SERVICE)
TARGET = total("ray_serve_autoscaling_target_replicas", "deployment", OF_SERVICE)
WANTED = total("ray_baton_autoscaling_wanted_replicas", "deployment", OF_SERVICE)
SIGNAL = total("ray_baton_autoscaling_signal", "deployment, signal", OF_SERVICE)

OVERVIEW = [
    Row(
        "Requests",
        [
            Panel(
                "Sequences per second",
                "Sequences that ended. A request is as many sequences as it has prompts times `n`.",
                "reqps",
                {rate("baton_sequences_total", "model"): "{{model}}"},
            ),
            Panel(
                "Goodput",
                "The part of the sequences that ended well and within their model's `slo` (time to the first token, "
                "mean time between tokens). Invalid ones do not count, and those that the client ended only if it had "
                "waited for a token for longer than `slo.ttft_ms`.",
                "percentunit",
                {GOODPUT: "{{model}}"},
                maximum=1,
            ),
            Panel(
                "Sequences by their end",
                "stop and length are answers, cancelled are clients that went away, gave_up those that had waited too "
                "long; the rest are errors: Overloaded is a 429, NoReplica a 503, TimeoutError and DeadlineExceeded "
                "are 504s, Quarantined is a 400.",
                "reqps",
                {rate("baton_sequences_total", "model, end"): "{{model}} {{end}}"},
            ),
            Panel(
                "HTTP responses",
                "By status, of all of the frontends' routes. The models of a service share them.",
                "reqps",
                {rate("http_requests_total", "status", OF_SERVICE): "{{status}}"},
            ),
            Panel(
                "Tokens per second",
                "Prompt tokens of sequences that began to answer, cached ones included, and tokens generated.",
                "short",
                {
                    PROMPT_TOKENS: "{{model}} prompt",
                    rate("baton_generation_tokens_total", "model"): "{{model}} generated",
                },
            ),
            Panel(
                "Frontends' CPU",
                "Cores that each frontend uses. It is one process with one event loop: near 1 it holds tokens back.",
                "short",
                {
                    "rate(process_cpu_seconds_total"
                    f'{{{OF_SERVICE}, endpoint="baton-metrics"}}[$__rate_interval])': "{{pod}}"
                },
            ),
        ],
    ),
    Row(
        "Latency",
        [
            Panel(
                "Time to first token",
                "From the request's arrival at the engine client to its first token, waiting included.",
                "s",
                quantiles("baton_time_to_first_token_seconds"),
            ),
            Panel(
                "Time to first token, p95 by way",
                "remote: prefilled by the prefill pool; local: where it is decoded.",
                "s",
                {
                    "histogram_quantile(0.95, "
                    f"{rate('baton_time_to_first_token_seconds_bucket', 'le, model, kind')})": "{{model}} {{kind}}"
                },
            ),
            Panel(
                "Inter-token latency",
                "Gaps between the deltas of a sequence, as the frontends got them. A frontend that is behind merges "
                "tokens, so a delta may hold several.",
                "s",
                quantiles("baton_inter_token_latency_seconds"),
            ),
            Panel(
                "Gap of resumed sequences",
                "How long clients waited for the next token when the replica of their answer was lost, or drained as "
                "it was being removed, and it went on elsewhere.",
                "s",
                quantiles("baton_resume_gap_seconds", "model, reason"),
            ),
        ],
    ),
    Row(
        "Queues",
        [
            Panel(
                "Queued prompt tokens",
                "Tokens that wait to be computed, all replicas together. What grows in prefill is time to the first "
                "token; what grows in decode is prefilled there.",
                "short",
                {QUEUED_TOKENS: "{{model}} {{role}}"},
            ),
            Panel(
                "Sequences",
                "Sequences that the replicas have not finished, and those of them that decode. Prefill counts its own.",
                "short",
                {
                    total("ray_baton_replica_sequences", "model, role"): "{{model}} {{role}}",
                    total("ray_baton_decoding_sequences", "model, role"): "{{model}} {{role}} decoding",
                },
            ),
            Panel(
                "Sequences that wait in an engine",
                "Not scheduled yet, or preempted: the engine has no room in its batch or no KV blocks for them.",
                "short",
                {total("ray_baton_waiting_sequences", "model, role"): "{{model}} {{role}}"},
            ),
        ],
    ),
    Row(
        "Failures",
        [
            Panel(
                "Replicas beside their pool",
                "How many times as long a replica takes as the median of its pool's others, on the mean over the "
                "frontends. Less is sent to a slow one; nothing replaces it.",
                "short",
                {
                    f"avg by (model, role, replica) (baton_replica_slowness{{{OF_MODEL}}})": (
                        "{{model}} {{role}} {{replica}}"
                    )
                },
            ),
            Panel(
                "Left out of routing",
                "How often frontends left out a replica of a role, or a pair of a prefill and a decode replica, in "
                "each interval. `/stats` says which ones.",
                "short",
                {
                    f"sum by (model, end) (increase(baton_ejections_total{{{OF_MODEL}}}[$__rate_interval]))": (
                        "{{model}} {{end}}"
                    )
                },
            ),
            Panel(
                "Quarantined prompts and refused retries",
                "In each interval: prompts that two engines died of, and requests that failed and were not tried again "
                "as more than a tenth of a frontend's requests were.",
                "short",
                {
                    f"sum by (model) (increase(baton_quarantines_total{{{OF_MODEL}}}[$__rate_interval]))": (
                        "{{model}} quarantined"
                    ),
                    f"sum by (service) (increase(baton_retries_refused_total{{{OF_SERVICE}}}[$__rate_interval]))": (
                        "{{service}} not tried again"
                    ),
                },
            ),
            Panel(
                "Resumed sequences",
                "Sequences that went on elsewhere in mid-answer, in each interval: their replica was lost, or drained "
                "as it was being removed, or they gave way to a higher class.",
                "short",
                {
                    "sum by (model, reason) "
                    f"(increase(baton_resume_gap_seconds_count{{{OF_MODEL}}}[$__rate_interval]))": (
                        "{{model}} {{reason}}"
                    )
                },
            ),
            Panel(
                "Refused bodies",
                "Requests per second whose bodies were too large (413), too slow (408), or too much beside others that "
                "were arriving (429). HTTP responses does not have them.",
                "reqps",
                {rate("baton_refused_bodies_total", "service, status", OF_SERVICE): "{{service}} {{status}}"},
            ),
        ],
    ),
    Row(
        "Replicas by role",
        [
            Panel(
                "Replicas in each role",
                "Those that frontends reach, by the role that each has now, on the mean over the frontends. It differs "
                "from the deployments below where replicas have switched their roles or cannot be reached.",
                "short",
                {f"avg by (model, role) (baton_replicas{{{OF_MODEL}}})": "{{model}} {{role}}"},
            ),
            Panel(
                "Role switches",
                "Replicas that came to a role from another one, in each interval. Every frontend sees each of them.",
                "short",
                {
                    f"max by (model, role) (increase(baton_role_switches_total{{{OF_MODEL}}}[$__rate_interval]))": (
                        "{{model}} to {{role}}"
                    )
                },
            ),
            Panel(
                "Models asleep",
                "1 for a model without replicas that a request wakes, and the requests that wait for that.",
                "short",
                {
                    f"min by (model) (baton_model_asleep{{{OF_MODEL}}})": "{{model}} asleep",
                    total("baton_waking_requests", "model"): "{{model}} requests that wait",
                },
            ),
        ],
    ),
    Row(
        "Replicas and autoscaling (deployments of all models: ROLE-MODEL)",
        [
            Panel(
                "Replicas",
                "Ready ones, and how many Serve tries to have. A lasting difference are replicas that load or that no "
                "node has room for.",
                "short",
                {READY: "{{deployment}} ready", TARGET: "{{deployment}} target"},
            ),
            Panel(
                "Wanted replicas",
                "What the pool's policy asks for. Serve applies delays and bounds to it: above the target for long "
                "means that `max_replicas` is reached.",
                "short",
                {WANTED: "{{deployment}}"},
            ),
            Panel(
                "Autoscaling signals",
                "What the policies go by, each in its own unit.",
                "short",
                {SIGNAL: "{{deployment}} {{signal}}"},
            ),
        ],
    ),
]

PREFILL_AND_DECODE = [
    Row(
        "Load of the replicas",
        [
            Panel(
                "Queued prompt tokens by replica",
                "Tokens that wait to be computed. Replicas of a pool should be alike; routing weighs cache hits "
                "against this.",
                "short",
                {total("ray_baton_queued_prompt_tokens", "model, role, replica"): "{{model}} {{role}} {{replica}}"},
            ),
            Panel(
                "Sequences by replica",
                "Sequences that the replica has not finished, waiting ones included.",
                "short",
                {total("ray_baton_replica_sequences", "model, role, replica"): "{{model}} {{role}} {{replica}}"},
            ),
            Panel(
                "KV in use",
                "The part of the KV blocks that sequences and handoffs hold; cached blocks that nobody uses are free.",
                "percentunit",
                {
                    f"{total('ray_baton_kv_blocks_used', 'model, role, replica')}"
                    f" / {total('ray_baton_kv_blocks', 'model, role, replica')}": "{{model}} {{role}} {{replica}}"
                },
                maximum=1,
            ),
        ],
    ),
    Row(
        "KV transfers",
        [
            Panel(
                "Transfers per second",
                "KV that decode pulled from prefill, and attempts that failed, handshakes included.",
                "ops",
                {
                    rate("ray_baton_kv_transfers_total", "model"): "{{model}} done",
                    rate("ray_baton_kv_transfer_failures_total", "model"): "{{model}} failed",
                },
            ),
            Panel(
                "Bandwidth of a transfer",
                "Bytes moved over the time that transfers took: what one of them gets, not what the link carries. "
                "SGLang does not tell the time, so for it there is none.",
                "Bps",
                {
                    f"{rate('ray_baton_kv_transferred_bytes_total', 'model')}"
                    f" / {rate('ray_baton_kv_transfer_seconds_total', 'model')}": "{{model}}"
                },
            ),
            Panel(
                "KV moved",
                "Bytes per second, all replicas together.",
                "Bps",
                {rate("ray_baton_kv_transferred_bytes_total", "model"): "{{model}}"},
            ),
            Panel(
                "Replicas by transport",
                "What carries KV to or from each replica's newest kind of peer, beside `transfer.required_transport`. "
                "cuda_ipc is NVLink or PCIe, rc, dc, ud and srd are RDMA, tcp is the slow path.",
                "short",
                {
                    f"count by (model, required, transport) (ray_baton_kv_transport{{{OF_MODEL}, "
                    'transport!=""} == 1)': "{{model}} {{transport}} (required: {{required}})"
                },
            ),
            Panel(
                "Speed between two replicas",
                "Bytes per second of the longest prompt of the latest probe of each pair, where the engine tells it.",
                "Bps",
                {f"ray_baton_link_bytes_per_second{{{OF_MODEL}}}": "{{prefill_replica}} to {{replica}} {{transport}}"},
            ),
            Panel(
                "Tokens moved by transport",
                "Prompt tokens whose KV moved, per second, by what carried them.",
                "short",
                {rate("baton_transferred_tokens_total", "model, transport"): "{{model}} {{transport}}"},
            ),
            Panel(
                "Expired handoffs",
                "Prompts that were prefilled and whose KV nobody pulled in time, in each interval.",
                "short",
                {
                    f"sum by (model) (increase(ray_baton_expired_handoffs_total{{{OF_MODEL}}}[$__rate_interval]))": (
                        "{{model}}"
                    )
                },
            ),
            Panel(
                "KV compared",
                "Transfers whose KV decode has compared with what prefill computed, per second, by the result: "
                "`transfer.checksum_rate` of all. Any that differ are wrong; their prompts were computed anew.",
                "ops",
                {
                    rate("ray_baton_kv_checksum_matches_total", "model"): "{{model}} right",
                    rate("ray_baton_kv_checksum_mismatches_total", "model"): "{{model}} wrong",
                    rate("ray_baton_kv_checksums_skipped_total", "model"): "{{model}} not comparable",
                },
            ),
        ],
    ),
    Row(
        "Routing",
        [
            Panel(
                "Decisions",
                "Where prompts were to be prefilled and why, per second, every attempt counted.",
                "ops",
                {rate("baton_decisions_total", "model, kind, reason"): "{{model}} {{kind}} {{reason}}"},
            ),
            Panel(
                "Where prompts were prefilled",
                "And why it was not as decided, if so: prefill_failed, prefill_timeout, transfer_failed, "
                "transport_refused, descriptor_expired, incompatible_kv, kv_changed.",
                "ops",
                {rate("baton_prefills_total", "model, kind, reason"): "{{model}} {{kind}} {{reason}}"},
            ),
            Panel(
                "Time to first token over prediction",
                "1 is as predicted, 2 took twice as long. Of prompts that went as decided.",
                "short",
                quantiles("baton_time_to_first_token_ratio", "model, kind"),
            ),
            Panel(
                "Prefix hits",
                "The part of the prompt tokens that no engine had to compute, as the router expected it and as the "
                "engines told it. A gap means that the router's view of the caches is wrong.",
                "percentunit",
                {
                    f"{CACHED} / {PROMPT_TOKENS}": "{{model}}",
                    f"{EXPECTED_CACHED} / {PROMPT_TOKENS}": "{{model}} expected",
                },
                maximum=1,
            ),
            Panel(
                "Time of a decision",
                "What deciding takes of the frontend.",
                "s",
                quantiles("baton_decision_seconds"),
            ),
        ],
    ),
]

DASHBOARDS = {
    "overview": ("Baton: overview", OVERVIEW),
    "prefill-and-decode": ("Baton: prefill and decode", PREFILL_AND_DECODE),
}


def dashboard(name: str) -> dict[str, Any]:
    """A dashboard as Grafana 11 reads it."""
    title, rows = DASHBOARDS[name]
    return {
        "uid": f"baton-{name}",
        "title": title,
        "tags": ["baton"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "links": [{"type": "dashboards", "title": "Baton", "tags": ["baton"], "keepTime": True, "includeVars": True}],
        "templating": {"list": _variables()},
        "panels": _place(rows),
    }


def _variables() -> list[dict[str, Any]]:
    scopes = {
        "namespace": 'up{job="baton"}',
        "service": 'up{job="baton", namespace=~"$namespace"}',
        "model": f"ray_baton_kv_blocks{{{OF_SERVICE}}}",
    }
    datasource = {"name": "datasource", "label": "data source", "type": "datasource", "query": "prometheus"}
    return [datasource, *(_variable(name, scope) for name, scope in scopes.items())]


def _variable(label: str, scope: str) -> dict[str, Any]:
    query = f"label_values({scope}, {label})"
    return {
        "name": label,
        "label": label,
        "type": "query",
        "datasource": DATASOURCE,
        "definition": query,
        "query": {"query": query, "refId": label},
        "refresh": 2,  # when the time range changes
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def _place(rows: list[Row]) -> list[dict[str, Any]]:
    placed: list[dict[str, Any]] = []
    y = 0
    for row in rows:
        position = {"x": 0, "y": y, "w": COLUMNS, "h": 1}
        placed.append({"type": "row", "title": row.title, "collapsed": False, "gridPos": position, "panels": []})
        y += 1
        for index, panel in enumerate(row.panels):
            line, column = divmod(index * PANEL_WIDTH, COLUMNS)
            position = {"x": column, "y": y + line * PANEL_HEIGHT, "w": PANEL_WIDTH, "h": PANEL_HEIGHT}
            placed.append(_timeseries(panel, position))
        y += -(-len(row.panels) * PANEL_WIDTH // COLUMNS) * PANEL_HEIGHT
    return [{"id": number, **panel} for number, panel in enumerate(placed, 1)]


def _timeseries(panel: Panel, position: dict[str, int]) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0, "custom": {"fillOpacity": 10, "showPoints": "never"}}
    if panel.maximum is not None:
        defaults["max"] = panel.maximum
    return {
        "type": "timeseries",
        "title": panel.title,
        "description": panel.description,
        "datasource": DATASOURCE,
        "gridPos": position,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": {
            "legend": {"displayMode": "table", "placement": "bottom", "calcs": ["lastNotNull", "max"]},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "targets": [
            {"refId": chr(ord("A") + index), "datasource": DATASOURCE, "expr": query, "legendFormat": legend}
            for index, (query, legend) in enumerate(panel.queries.items())
        ],
    }


def main() -> None:
    for name in DASHBOARDS:
        (FOLDER / f"{name}.json").write_text(json.dumps(dashboard(name), indent=2) + "\n")


if __name__ == "__main__":
    main()
