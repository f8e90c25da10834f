"""Every private name of Ray and Ray Serve that Baton uses, each as a function or class of its own.

Seen with Ray 2.60.  If a name is missing or takes other parameters, the import of this module fails with an error that
names it (app/upstream.py); tests/unit/test_canaries.py fails when something here is no longer needed.  Importing this
module imports Ray, which then reads its flags, so deployments/cluster.py does it only after they are set.
"""

from __future__ import annotations

import contextvars
from typing import Any

import ray

from app.upstream import check_attributes, check_parameters, check_uses, needed

with needed("ray", "keep replicas whose arguments have not changed"):
    from ray.serve._private.config import DeploymentConfig
    from ray.serve._private.deploy_utils import get_deploy_args
    from ray.serve.deployment import Deployment

    check_uses(Deployment.__init__, "_deployment_config")
    check_uses(Deployment.options, "_deployment_config")
    check_uses(get_deploy_args, "version")
    check_attributes(DeploymentConfig, "version")

with needed("ray", "hand a transfer descriptor from prefill to decode by reference"):
    from ray import ObjectRef
    from ray.serve._private.common import RequestMetadata
    from ray.serve._private.replica_result import ReplicaResult
    from ray.serve._private.utils import generate_request_id
    from ray.serve.handle import DeploymentHandle

    check_attributes(RequestMetadata, "request_id", "internal_request_id", "call_method", "_by_reference")
    check_parameters(ReplicaResult.to_object_ref, "self")
    check_parameters(generate_request_id)

with needed("ray", "call the replica that the frontend has chosen"):
    from ray.serve._private.common import DeploymentID
    from ray.serve._private.request_router.common import PendingRequest
    from ray.serve._private.request_router.replica_wrapper import RunningReplica
    from ray.serve._private.request_router.request_router import RequestRouter
    from ray.serve._private.router import AsyncioRouter

    check_parameters(RequestRouter._choose_replica_for_request, "self", "pending_request", "is_retry")
    check_parameters(RequestRouter.choose_replicas, "self", "candidate_replicas", "pending_request")
    check_parameters(RequestRouter.initialize_state, "self")
    check_parameters(RequestRouter.update_replicas, "self", "replicas")
    check_parameters(RequestRouter.on_replica_actor_died, "self", "replica_id")
    check_uses(AsyncioRouter._route_and_send_request_once, "_choose_replica_for_request")
    check_uses(AsyncioRouter._route_and_send_request_once, "is_cross_language")
    check_parameters(RunningReplica.try_send_request, "self", "pr", "with_rejection")
    check_uses(RequestRouter.__init__, "_deployment_id")
    check_parameters(DeploymentID, "name", "app_name")
    check_attributes(RequestRouter, "curr_replicas")
    check_attributes(RunningReplica, "replica_id", "replica_metadata")
    check_attributes(PendingRequest, "kwargs")
    check_attributes(DeploymentHandle, "deployment_name", "app_name", "_init")

with needed("ray", "serve vLLM's ASGI application"):
    from ray import serve
    from ray.serve._private.replica import SERVE_BUILD_ASGI_APP_METHOD

    check_parameters(serve.ingress, "app")

with needed("ray", "deploy applications from a configuration, and read it back"):
    from ray.serve._private.client import ServeControllerClient
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ApplicationDetails, ServeDeploySchema

    check_parameters(_get_global_client, "raise_if_no_controller_running")
    check_parameters(ServeControllerClient.deploy_apps, "self", "config")
    check_attributes(ServeControllerClient, "http_config")
    check_parameters(ServeControllerClient.get_serve_details, "self")
    check_attributes(ApplicationDetails, "deployed_app_config")

with needed("ray", "tell `baton status` what autoscaling wants and what the links are"):
    from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put

    check_parameters(_internal_kv_del, "key")
    check_parameters(_internal_kv_get, "key")
    check_parameters(_internal_kv_put, "key", "value")

__all__ = [
    "AsgiIngress",
    "ChosenReplicaRouter",
    "DeploymentID",
    "RunningReplica",
    "call_by_reference",
    "delete_internal_kv",
    "deploy_applications",
    "deployment_id_of",
    "find_serve",
    "fix_version",
    "get_internal_kv",
    "handle_from_outside",
    "http_host",
    "put_internal_kv",
    "serve_details",
]


class _FixedVersion(DeploymentConfig):
    """Serve's settings of a deployment.  Their version cannot be changed after they are made."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "version":
            super().__setattr__(name, value)


def fix_version(deployment: Any, version: str) -> None:
    """Make a deployment keep its replicas as long as `version` stays the same.  Call this before its ``options``.

    Serve restarts a deployment's replicas when its version changes.  It would give all deployments of an application a
    new version whenever anything in `args` changes, and on every ``serve.run``.  Can go once a deployment may have a
    version of its own again (``Deployment.options`` refuses one).
    """
    deployment._deployment_config = _FixedVersion(version=version)


def call_by_reference(replica: RunningReplica, method: str, *arguments: Any) -> ObjectRef[Any]:
    """Call a method of this replica and return the reference to its answer, which stays in Ray's object store.

    Serve's handle and router are left out: they have nothing to choose here, and do much for each call.  It is sent
    at once, and outside the HTTP request's context.  Otherwise Serve would cancel it with the request, and what it
    answers, which may have to be freed, would be lost.  Raises RayError.

    Can go once a handle can be told which replica to call and ``DeploymentResponse`` has a public way to its reference.
    """
    metadata = RequestMetadata(
        request_id=generate_request_id(),
        internal_request_id=generate_request_id(),
        call_method=method,
        _by_reference=True,  # by gRPC there would be no reference to the answer
    )
    call = PendingRequest(list(arguments), {"replica_id": replica.replica_id.unique_id}, metadata)
    result: ReplicaResult = contextvars.Context().run(replica.try_send_request, call, with_rejection=False)
    return result.to_object_ref()


def handle_from_outside(deployment: str, application: str) -> DeploymentHandle[Any]:
    """Return a handle for a process without an event loop.  From now on Serve tells it which replicas are ready.

    Baton has routers run on the loop of their process (deployments/cluster.py), which would be the default here too.
    Can go once that can be chosen for each handle.
    """
    handle = DeploymentHandle(deployment, application)
    handle._init(_run_router_in_separate_loop=True)
    return handle


def deployment_id_of(handle: Any) -> DeploymentID:
    """Return the id of a handle's deployment.  The request routers in the same process know it by the same id."""
    return DeploymentID(name=handle.deployment_name, app_name=handle.app_name)


class _WithoutRejection:
    """A replica that Serve does not ask whether it takes a call, as it does not ask those in Java."""

    is_cross_language = True

    def __init__(self, replica: RunningReplica) -> None:
        self._replica = replica

    def __getattr__(self, name: str) -> Any:
        return getattr(self._replica, name)


class ChosenReplicaRouter(RequestRouter):
    """A request router for callers that have already chosen: they name the replica in the call's ``replica_id``.

    Serve queues requests until any replica has room.  Here at most one replica is possible, so the call is sent at once
    or fails at once.  A subclass finds that replica in `find_replica`.  Can go once a caller can tell a handle which
    replica to call.
    """

    @property
    def deployment_id(self) -> DeploymentID:
        """The deployment to which this router sends calls."""
        return self._deployment_id

    def find_replica(self, replica_id: str) -> RunningReplica:
        """Return the replica with this id.  If there is none, raise the error that the call should raise."""
        raise NotImplementedError

    async def _choose_replica_for_request(
        self, pending_request: PendingRequest, *, is_retry: bool = False
    ) -> RunningReplica:
        found: Any = _WithoutRejection(self.find_replica(pending_request.kwargs["replica_id"]))
        return found

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        raise RuntimeError("Serve no longer asks _choose_replica_for_request first; see ChosenReplicaRouter")


class AsgiIngress:
    """The base of an ingress deployment that makes its own ASGI application, in the replica.

    Subclasses are decorated with ``@serve.ingress()``.  Can go once ``serve.ingress`` accepts such a class through a
    public name.
    """

    def asgi_app(self) -> Any:
        """Return the application.  Serve calls this once, after ``__init__``."""
        raise NotImplementedError

    def __serve_build_asgi_app__(self) -> Any:
        return self.asgi_app()


with needed("ray", "serve vLLM's ASGI application"):
    getattr(AsgiIngress, SERVE_BUILD_ASGI_APP_METHOD)

with needed("ray", "find a cluster on loopback"):
    from ray._private import ray_constants, services

    check_uses(services.get_node_ip_address, "ENABLE_RAY_CLUSTER")
    check_uses(services.resolve_ip_for_localhost, "get_node_ip_address")


def look_on_loopback() -> None:
    """Have Ray look there for a cluster that listens on 127.0.0.1, instead of at this machine's own address.

    As RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER does (LOOPBACK in deployments/cluster.py), which Ray reads when it is imported.
    Other clusters are found as before.
    """
    ray_constants.ENABLE_RAY_CLUSTER = False


def find_serve() -> None:
    """Raise RayServeException unless Serve runs in the cluster.

    ``serve.status`` does not tell: without Serve it reports that nothing is served.
    """
    _get_global_client()


def http_host() -> str | None:
    """Return the address at which Serve listens for requests; None if Serve does not run.

    Nor does it outside a cluster, where Serve's own look-up would start one.
    """
    if not ray.is_initialized():
        return None
    client = _get_global_client(raise_if_no_controller_running=False)
    host: str | None = client.http_config.host if client is not None else None
    return host


def deploy_applications(applications: list[dict[str, Any]]) -> None:
    """Make Serve run these applications and no others; they are the ``applications`` of a Serve config.

    Returns before they are up.  Raises RayServeException if Serve does not run.  ``serve.run`` would also start them,
    but it keeps no configuration in the cluster.  Can go once Serve offers in Python what ``serve deploy`` does through
    the dashboard.
    """
    _get_global_client().deploy_apps(ServeDeploySchema.model_validate({"applications": applications}))


def serve_details() -> dict[str, Any]:
    """Return Serve's ``ServeInstanceDetails``: the configuration, deployments and replicas of each application.

    Raises RayServeException if Serve does not run.  Can go once ``serve.status`` has as much: it has neither
    the configurations nor the target numbers of replicas.
    """
    details: dict[str, Any] = _get_global_client().get_serve_details()
    return details


def put_internal_kv(key: str, value: str) -> None:
    """Keep `value` in the cluster's key-value store.  Can go once Ray has a public one."""
    _internal_kv_put(key, value)


def delete_internal_kv(key: str) -> None:
    """Remove what `put_internal_kv` stored under `key`, if there is anything."""
    _internal_kv_del(key)


def get_internal_kv(key: str) -> bytes | None:
    """Return the value that `put_internal_kv` stored under `key`; None if there is none."""
    value: bytes | None = _internal_kv_get(key)
    return value
