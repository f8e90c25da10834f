"""The running application as Serve has it: its configuration, which can be deployed anew, and its replicas."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from typing import Any

import psutil

UPDATE_TIMEOUT_S = 500.0
"""How long an update may take: each replica starts anew, one after the other."""
POLL_S = 0.25


class BadAnswer(Exception):
    """During a fault somebody got what nobody should get."""


class Deployed:
    """One application of the Serve that the given raylet belongs to."""

    def __init__(self, name: str) -> None:
        self.name = name

    async def connect(self, raylet: int) -> None:
        """Join the Ray cluster, of which there may be several on this machine."""
        await asyncio.to_thread(self._connect, raylet)

    def _connect(self, raylet: int) -> None:
        from deployments.cluster import connect

        flag, process = "--gcs-address=", psutil.Process(raylet)
        given = next(part for part in process.cmdline() if part.startswith(flag))
        os.environ["RAY_ADDRESS"] = given.removeprefix(flag)
        # Ray itself chooses token authentication only where it finds the cluster by itself.
        os.environ |= {name: value for name, value in process.environ().items() if name.startswith("RAY_AUTH_")}
        connect()

    def arguments(self) -> dict[str, Any]:
        """Return the configuration with which it was deployed, for the caller to change."""
        from app.serve_document import unshared

        arguments: dict[str, Any] = unshared(self._application()["deployed_app_config"]["args"])
        return arguments

    def deploy(self, arguments: dict[str, Any]) -> None:
        """Deploy it again, as the only application.  Returns before anything has changed."""
        from deployments.serve_hooks import deploy_applications

        deploy_applications([{**self._application()["deployed_app_config"], "args": arguments}])

    def replicas(self) -> dict[str, dict[str, str]]:
        """Return the state of each replica by its id, for each deployment."""
        return {
            name: {replica["replica_id"]: str(replica["state"].value) for replica in deployment["replicas"]}
            for name, deployment in self._application()["deployments"].items()
        }

    def has_settled(self) -> bool:
        """Whether the last update is through, down to the end of the last old replica.  Raises BadAnswer."""
        application = self._application()
        status = str(application["status"].value)
        if status == "DEPLOY_FAILED":
            raise BadAnswer(f"the update failed: {application['message']}")
        return status == "RUNNING" and all(
            [replica["state"].value for replica in deployment["replicas"]]
            == ["RUNNING"] * deployment["target_num_replicas"]
            for deployment in application["deployments"].values()
        )

    def link_problems(self) -> set[str]:
        """Return why KV does not move between pairs of replicas."""
        from deployments.replica.link_record import read_links

        ready = [replica for replicas in self.replicas().values() for replica in replicas]
        return {link.problem for replica in ready for link in read_links(self.name, replica) if link.problem}

    def _application(self) -> dict[str, Any]:
        from deployments.serve_hooks import serve_details

        application: dict[str, Any] = serve_details()["applications"][self.name]
        return application

    async def update(self, arguments: dict[str, Any], look: Callable[[], None] = lambda: None) -> None:
        """Deploy it again, and return when that is through.  Calls `look`, on a thread, every now and then meanwhile.

        Raises BadAnswer.
        """

        def has_settled() -> bool:
            look()
            return self.has_settled()

        await asyncio.to_thread(self.deploy, arguments)
        deadline = time.monotonic() + UPDATE_TIMEOUT_S
        while not await asyncio.to_thread(has_settled):
            if time.monotonic() > deadline:
                raise BadAnswer(f"after {UPDATE_TIMEOUT_S:.0f} s the update is not through: {self.replicas()}")
            await asyncio.sleep(POLL_S)
