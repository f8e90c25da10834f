"""Who has work and says nothing for too many looks in a row counts as gone."""

import pytest

from app.channel import silence as module
from app.channel.silence import MAX_LOOKS, MIN_LOOKS, Silence


def looks_until_gone(silence: Silence, *, can_be_replaced: bool = True) -> int:
    """Return after how many looks without a word it counts as gone."""
    heard = silence._num_heard
    for number in range(1, MAX_LOOKS + 1):
        if silence.look(heard, has_work=True, can_be_replaced=can_be_replaced):
            return number
    raise AssertionError("it never does")


def be_silent(silence: Silence, num_looks: int) -> None:
    """Be silent for so many looks, and then say something."""
    for _ in range(num_looks):
        assert not silence.look(silence._num_heard, has_work=True, can_be_replaced=True)
    assert not silence.look(silence._num_heard + 1, has_work=True, can_be_replaced=True)


def test_only_looks_in_a_row_without_a_word_count() -> None:
    silence = Silence()
    be_silent(silence, 1)
    assert not any(silence.look(1, has_work=True, can_be_replaced=True) for _ in range(MIN_LOOKS - 1))
    assert not silence.look(1, has_work=False, can_be_replaced=True)  # nothing is expected of it
    assert silence.num_looks == 0


def test_a_replica_that_speaks_all_the_time_is_left_soon() -> None:
    silence = Silence()
    for _ in range(3):
        be_silent(silence, 0)
    assert looks_until_gone(silence) == MIN_LOOKS


def test_a_replica_that_was_silent_and_went_on_may_be_silent_again_and_for_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    silence = Silence()
    be_silent(silence, 3)
    be_silent(silence, 1)
    assert looks_until_gone(silence) == 3 * module.PATIENCE
    silence = Silence()
    be_silent(silence, MIN_LOOKS - 1)
    assert looks_until_gone(silence) == MAX_LOOKS
    monkeypatch.setattr(module, "MEMORY_LOOKS", 10)
    silence = Silence()
    be_silent(silence, 3)
    for _ in range(10):
        be_silent(silence, 0)
    assert looks_until_gone(silence) == MIN_LOOKS


def test_a_replica_that_nobody_can_replace_gets_most_time() -> None:
    assert looks_until_gone(Silence(), can_be_replaced=False) == MAX_LOOKS
