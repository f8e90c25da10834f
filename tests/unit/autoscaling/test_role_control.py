"""The policies of a model's two deployments plan together, and write who is to change the role."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from app.autoscaling.load import Load
from app.autoscaling.replica_plan import Targets
from app.autoscaling.role_plan import PATIENCE_S, HomeReport
from app.messages import Role
from deployments import autoscaling, role_control
from deployments.role_control import GONE_S, RoleControl, control_of
from tests.unit.autoscaling.test_replica_plan import BUSY, context

PREFILL = Targets(ttft_s=2.0, itl_s=0.05, is_for_prompts=True, is_for_decoding=False)
DECODE = Targets(ttft_s=2.0, itl_s=0.05, is_for_prompts=False)
PROMPTS = Load(busy=1.0, queued_tokens=50_000, computed_tokens=10_000, prompts=5, prefilling=10)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Role]]:
    written: list[dict[str, Role]] = []
    monkeypatch.setattr(role_control, "read_roles", lambda application, model: {})
    monkeypatch.setattr(role_control, "write_roles", lambda application, model, roles: written.append(dict(roles)))
    monkeypatch.setattr(role_control, "_controls", {})
    return written


def reports(loads: Mapping[str, Load]) -> dict[Role, HomeReport]:
    def of(home: Role, targets: Targets) -> HomeReport:
        names = [f"{home}-{number}" for number in range(2)]
        return HomeReport(targets, names, {name: loads[name] for name in names if name in loads}, 2)

    return {"prefill": of("prefill", PREFILL), "decode": of("decode", DECODE)}


def test_a_switch_is_written_once_and_what_was_reported_before_it_counts_no_more(
    written: list[dict[str, Role]],
) -> None:
    control = RoleControl("a", "m", 4)
    known = reports({"prefill-0": PROMPTS, "prefill-1": PROMPTS, "decode-0": Load(), "decode-1": Load(decoding=1)})
    assert control.plan("prefill", known["prefill"], {}, 0.0) is None
    times = {"decode-0": 41.0, "decode-1": 42.0}
    for second in range(int(PATIENCE_S) + 3):
        plan = control.plan("decode", known["decode"], times, float(second))
    assert written == [{"decode-0": "prefill"}], "the idle one"
    assert control.switched_at == {"decode-0": 41.0}
    assert plan is not None
    assert plan.replicas == {"prefill": 2, "decode": 2}, "as many as the budget allows are there"


def test_only_a_replica_that_has_not_run_for_long_is_forgotten(
    written: list[dict[str, Role]], monkeypatch: pytest.MonkeyPatch
) -> None:
    forgotten: list[str] = []
    monkeypatch.setattr(role_control, "forget_told", lambda application, replica: forgotten.append(replica))
    control = RoleControl("a", "m", 4)
    control._assigned, control.switched_at = {"decode-1": "prefill", "decode-9": "prefill"}, {"decode-9": 40.0}
    known = reports({})
    few = HomeReport(DECODE, ["decode-0"], {}, 2)
    control.plan("prefill", known["prefill"], {}, 0.0)
    control.plan("decode", few, {}, 1.0)
    control.plan("decode", known["decode"], {}, GONE_S)
    assert (written, forgotten) == ([], []), "decode-1 has only not been found again until then"
    control.plan("decode", known["decode"], {}, GONE_S + 2)
    assert (written, forgotten) == ([{"decode-1": "prefill"}], ["decode-9"])
    assert control.switched_at == {}


def test_the_two_policies_of_a_model_share_a_control_until_its_budget_changes(written: list[Any]) -> None:
    assert control_of("a", "m", 4) is control_of("a", "m", 4)
    assert control_of("a", "m", 4) is not control_of("a", "n", 4)
    assert control_of("a", "m", 5).budget == 5


def test_only_reports_from_after_a_switch_count() -> None:
    arrivals = autoscaling.Arrivals()
    assert autoscaling.reported_loads(context(BUSY, newest=100.0), arrivals, 0.0, {"0": 98.5}) != {}
    assert autoscaling.reported_loads(context(BUSY, newest=100.0), arrivals, 0.0, {"0": 99.0}) == {}
    assert dict(arrivals.latest())


def test_a_policy_with_a_budget_plans_for_both(written: list[Any]) -> None:
    targets: dict[str, Any] = {"ttft_s": 2.0, "itl_s": 0.05, "is_for_prompts": False}
    decode = autoscaling.PoolPolicy("m", "decode", budget=4, **targets)
    prefill = autoscaling.PoolPolicy("m", "prefill", budget=4, **{**targets, "is_for_prompts": True})
    assert decode.plan(context(BUSY)).reason == "the other pool has not reported yet"
    plan = prefill.plan(context(BUSY))
    assert plan.reason.startswith("prefill: ")
    assert plan.signals["decode_demand"] > 0
