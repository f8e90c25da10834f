"""What `baton scale` makes of a Serve config."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import ConfigError
from app.replica_bounds import Bounds, bounds_of, parse_targets, scale, scale_document


def applications() -> list[dict[str, Any]]:
    pool = {"engine": "sim", "replicas": 2}  # one object in two places, as an anchor in YAML makes it
    scaled = {"engine": "sim", "autoscaling": {"min_replicas": 1, "initial_replicas": 2, "max_replicas": 4}}
    return [
        {
            "name": "baton",
            "args": {
                "models": [
                    {"name": "org/first", "source": "baton:tiny", "prefill": pool, "decode": scaled},
                    {"name": "second", "source": "baton:tiny", "decode": pool},
                ],
                "transfer": {},
            },
        }
    ]


def section(changed: list[dict[str, Any]], model: int, pool: str) -> dict[str, Any]:
    found: dict[str, Any] = changed[0]["args"]["models"][model][pool]
    return found


def test_targets_are_a_number_or_two() -> None:
    assert parse_targets(["prefill=3", "decode=2..6"]) == {"prefill": Bounds(3, 3), "decode": Bounds(2, 6)}
    assert parse_targets(["decode=0..2"]) == {"decode": Bounds(0, 2)}


@pytest.mark.parametrize(
    "text", ["prefill", "prefill=", "prefill=x", "prefill=0", "decode=3..2", "=-1", "prefill=1..2..3"]
)
def test_a_wrong_target_is_named(text: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_targets([text])
    assert error.value.field == text


def test_a_pool_is_named_once() -> None:
    with pytest.raises(ConfigError, match="twice"):
        parse_targets(["prefill=1", "prefill=2"])


def test_a_fixed_number_stays_one() -> None:
    changed = scale(applications(), "second", parse_targets(["decode=5"]))
    assert section(changed, 1, "decode") == {"engine": "sim", "replicas": 5}
    assert changed[0]["args"]["models"][0] == applications()[0]["args"]["models"][0]


def test_two_numbers_are_for_autoscaling_to_choose_between() -> None:
    changed = scale(applications(), "org/first", parse_targets(["prefill=2..3"]))
    assert section(changed, 0, "prefill") == {"engine": "sim", "autoscaling": {"min_replicas": 2, "max_replicas": 3}}


def test_autoscaling_keeps_its_other_settings() -> None:
    given_ = applications()
    given_[0]["args"]["models"][0]["decode"]["autoscaling"]["downscale_delay_s"] = 7
    changed = scale(given_, "org/first", parse_targets(["decode=3"]))
    assert section(changed, 0, "decode")["autoscaling"] == {
        "min_replicas": 3,
        "max_replicas": 3,
        "downscale_delay_s": 7,
    }


def test_the_frontend_is_the_applications() -> None:
    assert scale(applications(), "second", parse_targets(["frontend=2"]))[0]["args"]["frontend"] == {"replicas": 2}


def test_the_application_stands_for_its_only_model() -> None:
    given_ = applications()
    with pytest.raises(ConfigError, match="there are org/first, second"):
        scale(given_, "baton", parse_targets(["decode=2"]))
    del given_[0]["args"]["models"][1]
    assert bounds_of(section(scale(given_, "baton", parse_targets(["decode=2"])), 0, "decode")) == Bounds(2, 2)


def test_an_unknown_pool_is_named_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError) as error:
        scale(applications(), "second", parse_targets(["prefill=2"]))
    assert str(error.value) == "prefill: second has no such pool; it has frontend, decode"


@given(st.integers(1, 99), st.integers(0, 99), st.sampled_from(["prefill", "decode", "frontend"]))
def test_what_was_asked_for_is_read_back_and_the_given_config_stays(low: int, more: int, pool: str) -> None:
    before = applications()
    bounds = Bounds(low, low + more)
    changed = scale(before, "org/first", parse_targets([f"{pool}={bounds}"]))
    found = changed[0]["args"].get(pool) or section(changed, 0, pool)
    assert bounds_of(found) == bounds
    assert before == applications()


def test_a_document_is_changed_in_nothing_else() -> None:
    document = {"proxy_location": "EveryNode", "applications": applications()}
    changed = scale_document(document, "second", parse_targets(["decode=9"]))
    assert section(changed["applications"], 1, "decode") == {"engine": "sim", "replicas": 9}
    section(changed["applications"], 1, "decode")["replicas"] = 2
    assert changed == document
