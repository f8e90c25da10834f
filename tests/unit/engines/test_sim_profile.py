"""Timing profiles: what loads, what is refused, and whether fitting finds again what a profile says."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.bench.engine_profile import TimedOutput, choose_extent, measure
from app.engines.sim.profile import (
    FOLDER,
    PrefillTimes,
    SimProfile,
    StepTimes,
    TransferTimes,
    built_in_profiles,
    fit_prefill,
    fit_step,
    load_profile,
    to_yaml,
)
from app.engines.sim.scheduler import ScheduledSequence, Scheduler, SchedulerLimits
from app.errors import ConfigError
from app.least_squares import fit_non_negative


def test_the_built_in_profiles_load_and_say_where_their_numbers_come_from() -> None:
    assert built_in_profiles() == ["cpu-tiny-qwen3", "h200-llama-8b"]
    for name in built_in_profiles():
        profile = load_profile(name)
        assert "measured" in profile.source.lower() or "docs/benchmarks" in profile.source
        assert profile == load_profile(str(FOLDER / f"{name}.yaml"))


def test_the_h200_profile_gives_the_times_that_were_measured_there() -> None:
    """Prompts alone, in chunks of 2,048 tokens; steps of several sequences; the second token after the first."""
    profile = load_profile("h200-llama-8b")
    for tokens, measured_s in ((64, 0.0326), (512, 0.0332), (2048, 0.0527), (8192, 0.2180), (15000, 0.4492)):
        scheduler = Scheduler(
            SchedulerLimits(
                num_blocks=2048, block_size=16, max_model_len=16384, max_num_seqs=128, max_num_batched_tokens=2048
            ),
            profile,
            range(1000),
            0,
        )
        scheduler.add(ScheduledSequence(list(range(tokens)), max_tokens=1))
        seconds = profile.latency.engine_s
        while step := scheduler.step():
            seconds += step.duration_s
        assert seconds == pytest.approx(measured_s, rel=0.07)
    for sequences, length, measured_s in ((1, 532, 0.00469), (8, 532, 0.00493), (32, 532, 0.0056), (16, 300, 0.0052)):
        assert profile.step_s(sequences, sequences * length) == pytest.approx(measured_s, rel=0.04)
    for tokens, measured_s in ((64, 0.0110), (512, 0.0104), (2048, 0.0121)):
        pulled = profile.transfer_s(tokens * profile.kv_bytes_per_token) + profile.step_s(1, tokens)
        assert pulled == pytest.approx(measured_s, rel=0.08)


PROFILE_TEXT = (FOLDER / "h200-llama-8b.yaml").read_text()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "No such file"),
        ("a: [", "is not YAML"),
        ("5", "the file"),
        (PROFILE_TEXT.replace("step:", "steps:"), "step: Field required"),
        (PROFILE_TEXT.replace("base_s: 0.00465", "base_s: -1"), "step.base_s"),
        (PROFILE_TEXT + "note: x\n", "note: Extra inputs"),
    ],
    ids=["missing", "no YAML", "a number", "a section missing", "below 0", "an unknown key"],
)
def test_a_file_that_is_no_profile_is_refused_with_its_path_and_field(
    tmp_path: Path, text: str | None, words: str
) -> None:
    path = tmp_path / "mine.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_profile(str(path))
    assert str(path) in caught.value.problem
    assert words in caught.value.problem


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="cpu-tiny-qwen3, h200-llama-8b"):
        load_profile("h100")


COEFFICIENT = st.floats(1e-3, 1.0)


@given(base=COEFFICIENT, per_token=COEFFICIENT, square=COEFFICIENT, missing=st.sets(st.integers(0, 2), max_size=2))
@settings(max_examples=50)
def test_a_fit_finds_the_coefficients_even_where_some_are_zero(
    base: float, per_token: float, square: float, missing: set[int]
) -> None:
    wanted = [base * 1e-2, per_token * 1e-4, square * 1e-8]
    wanted = [0.0 if index in missing else value for index, value in enumerate(wanted)]
    lengths = [64, 128, 256, 512, 1024, 2048, 4096]
    times = fit_prefill([(n, wanted[0] + wanted[1] * n + wanted[2] * n**2) for n in lengths])
    found = [times.base_s, times.per_token_s, times.per_token_squared_s]
    for n in lengths:
        modelled = found[0] + found[1] * n + found[2] * n**2
        assert modelled == pytest.approx(wanted[0] + wanted[1] * n + wanted[2] * n**2, rel=1e-3)


def test_no_coefficient_is_ever_negative() -> None:
    falling = [(64, 0.5), (128, 0.4), (256, 0.3), (512, 0.2)]
    times = fit_prefill(falling)
    assert times.base_s > 0
    assert (times.per_token_s, times.per_token_squared_s) == (0, 0)
    steps = fit_step([(1, 100, 0.02), (2, 200, 0.01), (4, 400, 0.03)])
    assert min(steps.base_s, steps.per_sequence_s, steps.per_kv_token_s) >= 0
    assert fit_non_negative([[1.0]], [3.0]) == [3.0]


def test_a_profile_that_is_written_loads_again(tmp_path: Path) -> None:
    profile = load_profile("h200-llama-8b").model_copy(update={"source": "one line: with a colon\nand another"})
    path = tmp_path / "profile.yaml"
    path.write_text(to_yaml(profile))
    loaded = load_profile(str(path))
    assert loaded.source.strip() == profile.source
    assert loaded.model_copy(update={"source": profile.source}) == profile


class VirtualEndpoint:
    """A server around the scheduler, in virtual time: each token arrives `overhead_s` after its step."""

    def __init__(self, profile: SimProfile, overhead_s: float) -> None:
        limits = SchedulerLimits(
            num_blocks=8192, block_size=16, max_model_len=8192, max_num_seqs=64, max_num_batched_tokens=4096
        )
        self._scheduler = Scheduler(limits, profile, range(100, 1000), 0)
        self._overhead_s = overhead_s
        self._now = 0.0
        self._arrivals: dict[ScheduledSequence, list[tuple[float, int]]] = {}
        self._rng = random.Random(0)

    def new_prompt(self, num_tokens: int) -> list[int]:
        return self._rng.choices(range(100, 1000), k=num_tokens)

    async def complete(self, prompt: list[int], max_tokens: int) -> TimedOutput:
        sequence = ScheduledSequence(prompt, max_tokens=max_tokens)
        sent_at, arrivals = self._now, self._arrivals.setdefault(sequence, [])
        self._scheduler.add(sequence)
        await asyncio.sleep(0)  # whoever else asks at the same time has done so when this goes on
        while sequence.state != "ended":
            self._step()
            await asyncio.sleep(0)
        return TimedOutput(sent_at, arrivals)

    def _step(self) -> None:
        step = self._scheduler.step()
        if step is None:
            return
        self._now += step.duration_s
        for sequence in step.outputs:
            arrivals = self._arrivals[sequence]
            arrivals.append((self._now + self._overhead_s, len(arrivals) + 1))


@pytest.mark.parametrize("name", ["h200-llama-8b", "cpu-tiny-qwen3"])
async def test_measuring_a_sim_engine_gives_its_profile_back(name: str) -> None:
    profile = load_profile(name)
    measured = await measure(VirtualEndpoint(profile, 0.012), choose_extent(4096, 32, 1), lambda _: None)  # type: ignore[arg-type]
    assert measured.overhead_s == pytest.approx(0.012, rel=0.05)
    prefill = fit_prefill(measured.prefills)
    step = fit_step([(one.num_sequences, one.num_kv_tokens, one.seconds) for one in measured.steps])
    again = SimProfile(
        source="again",
        prefill=prefill,
        step=step,
        transfer=TransferTimes(base_s=0, bytes_per_s=1),
        kv_bytes_per_token=1,
    )
    for tokens in (64, 500, 2048, 4096):
        assert again.prefill_s(tokens) == pytest.approx(profile.prefill_s(tokens), rel=0.02)
    for sequences, kv_tokens in ((1, 100), (8, 4000), (32, 60_000)):
        assert again.step_s(sequences, kv_tokens) == pytest.approx(profile.step_s(sequences, kv_tokens), rel=0.02)


def test_times_are_the_sums_that_the_module_describes() -> None:
    profile = SimProfile(
        source="made up",
        prefill=PrefillTimes(base_s=1, per_token_s=0.1, per_token_squared_s=0.01),
        step=StepTimes(base_s=2, per_sequence_s=0.2, per_kv_token_s=0.02),
        transfer=TransferTimes(base_s=3, bytes_per_s=100),
        kv_bytes_per_token=1,
    )
    assert profile.prefill_s(10) == pytest.approx(1 + 1 + 1)
    assert profile.step_s(5, 50) == pytest.approx(2 + 1 + 1)
    assert profile.transfer_s(200) == pytest.approx(3 + 2)
