"""Every error, reason and end that Baton tells is explained in docs/runbooks.md."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import get_args, get_type_hints

from app import errors
from app.frontend.health import State, Status
from app.frontend.sequence_record import CANCELLED, GAVE_UP
from app.messages import TokenDelta
from app.routing.decision import Lack
from deployments.haproxy import OWN_ERRORS
from tests.conftest import REPOSITORY

RUNBOOKS = (REPOSITORY / "docs" / "runbooks.md").read_text()
TEXT = " ".join(RUNBOOKS.split())
NAMED = set(re.findall(r"`([^`\n]+)`", RUNBOOKS))
DECIDING = ("app/routing/placement.py", "app/routing/survey.py", "app/frontend/attempt.py")
PREFILLING = ("deployments/replica/decode.py", "app/engines/vllm.py", "app/engines/sim/engine.py")
CONNECTING = ("app/channel/client.py", "deployments/frontend/pool_channels.py")


def tree(path: str) -> Iterator[ast.AST]:
    return ast.walk(ast.parse((REPOSITORY / path).read_text()))


def strings(node: ast.AST) -> Iterator[str]:
    """The string constants of an expression, those of conditions of a choice left out."""
    if isinstance(node, ast.IfExp):
        yield from strings(node.body)
        yield from strings(node.orelse)
    elif isinstance(node, ast.JoinedStr):
        for part in node.values:
            yield from strings(part)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value


def reasons(path: str) -> Iterator[str]:
    """What a module gives as a reason: it returns it beside something else, or calls it `reason`."""
    for node in tree(path):
        if isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple) and len(node.value.elts) == 2:
            yield from strings(node.value.elts[1])
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                pairs = (
                    zip(target.elts, node.value.elts, strict=True)
                    if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
                    else [(target, node.value)]
                )
                for name, value in pairs:
                    if isinstance(name, ast.Name) and name.id == "reason":
                        yield from strings(value)


def unreachable_reasons(path: str) -> Iterator[str]:
    """What /health has under `unreachable`, and what a replica is lost of, in pieces of text."""
    for node in tree(path):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "ReplicaLost" and len(node.args) == 2:
            yield from strings(node.args[1])
        elif isinstance(node, ast.Assign) and "self.unreachable" in ast.unparse(node.targets[0]):
            yield from strings(node.value)


def test_every_error_and_every_end_of_a_sequence_is_explained() -> None:
    types = {
        each.__name__ for each in vars(errors).values() if isinstance(each, type) and each.__module__ == "app.errors"
    }
    assert {"Quarantined", "DeadlineExceeded"} < types
    literal, _ = get_args(get_type_hints(TokenDelta)["finish_reason"])
    ends = {*types - {"BatonError"}, "TimeoutError", *get_args(literal), CANCELLED, GAVE_UP}
    assert "repetition" in ends
    assert ends - NAMED == set()


def test_every_reason_for_where_a_prompt_is_prefilled_is_explained() -> None:
    found = {reason for path in (*DECIDING, *PREFILLING) for reason in reasons(path)} - set(get_args(Lack))
    assert {"decode_full", "no_usable_link", "incompatible_kv", "descriptor_expired", "prefill_queue"} < found
    assert found - NAMED == set()


def test_everything_that_health_says_is_explained() -> None:
    assert {*get_args(State), *get_args(Status)} - NAMED == set()
    pieces = {piece.strip(" :") for path in CONNECTING for piece in unreachable_reasons(path)}
    assert {"it refuses this frontend", "its connection ended", "cannot be reached"} < pieces
    assert {piece for piece in pieces if piece not in TEXT} == set()


def test_every_error_of_haproxys_own_is_explained() -> None:
    assert [message for message in OWN_ERRORS.values() if message.partition(";")[0] not in TEXT] == []
