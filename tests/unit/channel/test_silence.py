"""Who has work and says nothing for too many looks in a row counts as gone."""

from app.channel.silence import MAX_LOOKS, Silence


def test_only_looks_in_a_row_without_a_word_count() -> None:
    silence = Silence()
    assert not any(silence.look(0, has_work=True) for _ in range(MAX_LOOKS - 1))
    assert not silence.look(1, has_work=True)  # it said something
    assert not any(silence.look(1, has_work=True) for _ in range(MAX_LOOKS - 1))
    assert not silence.look(1, has_work=False)  # nothing is expected of it
    assert not any(silence.look(1, has_work=True) for _ in range(MAX_LOOKS - 1))
    assert silence.look(1, has_work=True)
