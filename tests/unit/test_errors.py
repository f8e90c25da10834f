"""Errors keep their type, their fields and their words when they cross Serve deployments."""

import inspect
import pickle

import pytest

import app.cli.verify  # noqa: F401  defines an error of its own
from app.errors import BatonError


def family(parent: type[BatonError]) -> list[type[BatonError]]:
    return [parent, *(error for child in parent.__subclasses__() for error in family(child))]


def values(error: type[BatonError]) -> list[str]:
    """A different value for each parameter."""
    return ["the message"] if error is BatonError else [f"the {name}" for name in inspect.signature(error).parameters]


@pytest.mark.parametrize("error", family(BatonError), ids=lambda error: error.__name__)
def test_an_error_survives_pickling(error: type[BatonError]) -> None:
    before = error(*values(error))
    after = pickle.loads(pickle.dumps(before))
    assert type(after) is error
    assert after.args == before.args == tuple(values(error))
    assert vars(after) == vars(before)
    assert str(after) == str(before)


@pytest.mark.parametrize("error", family(BatonError), ids=lambda error: error.__name__)
def test_an_error_says_all_that_it_was_given(error: type[BatonError]) -> None:
    said = str(error(*values(error)))
    assert all(value in said for value in values(error))
