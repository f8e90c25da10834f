"""Builds the application with an agent in each process, and calls functions there.

``import_path: benchmarks.faults.agent_calls:build`` deploys what `deployments.build` does, with one addition to the
environment of its replicas: the agent (agent/sitecustomize.py).
"""

import json
import os
import socket
from pathlib import Path
from typing import Any, get_args

from app.messages import Role

AGENT = Path(__file__).parent / "agent"
CALL_TIMEOUT_S = 60.0
"""What a call needs may have to be imported first, on a busy machine."""


def build(args: dict[str, Any]) -> Any:
    """Make the application with agents.  Raises ConfigError."""
    from deployments.build import build as build_application

    return build_application(with_agents(args))


def with_agents(args: dict[str, Any]) -> dict[str, Any]:
    """Return the application's arguments with the agent in the environment of all of its deployments."""
    paths = [str(AGENT), str(AGENT.parents[2]), *filter(None, os.environ.get("PYTHONPATH", "").split(":"))]
    agent = {"PYTHONPATH": ":".join(dict.fromkeys(paths))}

    def add(section: dict[str, Any]) -> dict[str, Any]:
        return {**section, "environment": {**agent, **section.get("environment", {})}}

    def add_to_pools(model: dict[str, Any]) -> dict[str, Any]:
        return {**model, **{role: add(model[role]) for role in get_args(Role) if model.get(role) is not None}}

    frontend = add(args.get("frontend") or {})
    return {**args, "frontend": frontend, "models": [add_to_pools(model) for model in args["models"]]}


def call(pid: int, function: str, /, **arguments: Any) -> Any:
    """Call ``module:name`` in a process with an agent and return its result, which is JSON.

    Raises LookupError if the process is not there or has no agent, or if the function raised it, and RuntimeError if
    the function raised anything else.
    """
    module, _, name = function.partition(":")
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(CALL_TIMEOUT_S)
        try:
            connection.connect(f"\0baton-faults-{pid}")
            with connection.makefile("rwb") as stream:
                stream.write(json.dumps((module, name, arguments)).encode() + b"\n")
                stream.flush()
                answer = json.loads(stream.read())
        except (OSError, ValueError) as problem:
            raise LookupError(f"process {pid} has no agent that answers: {problem!r}") from problem
    if "missing" in answer:
        raise LookupError(f"process {pid}: {answer['missing']}")
    if "error" in answer:
        raise RuntimeError(answer["error"])
    return answer["result"]
