"""How many replicas a pool may have, as ``baton scale`` writes it into a Serve config."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from app.config import ModelConfig, parse
from app.errors import ConfigError
from app.serve_document import unshared


class Bounds(NamedTuple):
    """The least and the most replicas that autoscaling may choose; two equal numbers leave it no choice."""

    low: int
    high: int

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}..{self.high}"


def parse_targets(texts: Sequence[str]) -> dict[str, Bounds]:
    """Parse texts like ``prefill=3`` and ``decode=2..6`` into each pool's bounds.  Raises ConfigError."""
    targets: dict[str, Bounds] = {}
    for text in texts:
        pool, _, numbers = text.partition("=")
        match = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", numbers)
        if match is None:
            raise ConfigError(text, "say POOL=N or POOL=MIN..MAX, for example prefill=3 or decode=2..6")
        bounds = Bounds(int(match[1]), int(match[2] or match[1]))
        if not bounds.low <= bounds.high or bounds.high == 0:
            raise ConfigError(text, "MAX has to be at least 1 and not below MIN; with 0..MAX the pool sleeps when idle")
        if pool in targets:
            raise ConfigError(text, f"{pool} is there twice")
        targets[pool] = bounds
    return targets


def scale(applications: Sequence[Mapping[str, Any]], name: str, targets: Mapping[str, Bounds]) -> list[dict[str, Any]]:
    """Return the applications of a Serve config with the bounds of the model `name` changed; the arguments stay.

    `name` may also be that of an application that serves one model.  The pool ``frontend`` belongs to the application.
    Raises ConfigError for an unknown name or pool.
    """
    changed = unshared([dict(application) for application in applications])
    application, index = find_model(changed, name)
    config = parse(application["args"])
    for pool, bounds in targets.items():
        if pool == "frontend":
            section = application["args"].setdefault("frontend", {})
        else:
            _check_pool(pool, config.models[index])
            section = application["args"]["models"][index][pool]
        _set_bounds(section, bounds)
    parse(application["args"])
    return changed


def scale_document(document: Mapping[str, Any], name: str, targets: Mapping[str, Bounds]) -> dict[str, Any]:
    """Return a whole Serve config with the bounds changed; the given one stays as it is.  Raises ConfigError."""
    return {**document, "applications": scale(document["applications"], name, targets)}


def bounds_of(section: Mapping[str, Any]) -> Bounds:
    """Return the bounds that a pool's section of a Serve config has now."""
    if (autoscaling := section.get("autoscaling")) is None:
        return Bounds(*[section.get("replicas") or 1] * 2)
    return Bounds(autoscaling.get("min_replicas", 1), autoscaling.get("max_replicas", 1))


def find_model(applications: Sequence[Mapping[str, Any]], name: str) -> tuple[Any, int]:
    """Return the application that `name` means, and the index of its model.  Raises ConfigError."""
    names: list[str] = []
    for application in applications:
        models = [model.name for model in parse(application["args"]).models]
        if name in models:
            return application, models.index(name)
        if name == application["name"] and len(models) == 1:
            return application, 0
        names += models
    raise ConfigError(name, f"no such model; there are {', '.join(names) or 'none'}")


def _check_pool(pool: str, model: ModelConfig) -> None:
    known = ["frontend", *model.pools()]
    if pool not in known:
        raise ConfigError(pool, f"{model.name} has no such pool; it has {', '.join(known)}")


def _set_bounds(section: dict[str, Any], bounds: Bounds) -> None:
    """Set the bounds as the section does it: a fixed number stays fixed unless the bounds leave a choice."""
    if section.get("autoscaling") is None and bounds.low == bounds.high:
        section["replicas"] = bounds.low
        return
    section.pop("replicas", None)
    autoscaling = {**(section.get("autoscaling") or {}), "min_replicas": bounds.low, "max_replicas": bounds.high}
    autoscaling.pop("initial_replicas", None)  # it was for the first deployment, and may be outside the new bounds
    section["autoscaling"] = autoscaling
