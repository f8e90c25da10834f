"""Replicas are killed under load by `benchmarks.faults.losses`; their sequences go on elsewhere."""

from __future__ import annotations

from benchmarks.faults.losses import lose


async def test_answers_go_on_elsewhere_when_replicas_are_killed() -> None:
    outcome = await lose(num=6, num_replicas=5, num_streams=8, pause_s=0.1, seed=1)
    assert outcome.num_killed == 6
    assert outcome.num_resumed
    assert outcome.ends["right"]
    assert not outcome.ends["wrong"]
