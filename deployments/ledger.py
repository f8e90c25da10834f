"""The deployment with the tenants' limits, and how frontends talk to it (app/tenant_usage.py).

It is asked twice a second by each frontend, never for a request.  While it is gone, frontends go by what they know.  A
new one begins with full buckets, so each tenant may have one more burst.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Any

from app.tenant_usage import EXCHANGE_S, Accounts, Leases, Ledger, Usage
from app.tenants import KeyRing
from deployments.process import adopt_serve_logging

logger = logging.getLogger("baton.ledger")

ANSWER_TIMEOUT_S = 2.0


class LedgerDeployment:
    """Has one replica."""

    def __init__(self) -> None:
        adopt_serve_logging()
        self._ledger = Ledger()

    async def exchange(self, frontend: str, used: dict[str, Usage]) -> Leases:
        """See `Ledger.exchange`."""
        return self._ledger.exchange(frontend, used)


async def share_limits(
    ledger: Any, frontend: str, keys: KeyRing, accounts: Accounts, kv_sizes: Callable[[], Mapping[str, int]]
) -> None:
    """Tell the ledger what `frontend` has counted, and take what it says is left.  Runs until it is cancelled.

    `kv_sizes` returns the tokens that fit into the KV memory of each model's replicas.
    """
    is_lost = False
    while True:
        accounts.follow(keys.tenants, kv_sizes())
        told = accounts.usage()
        try:
            leases = await asyncio.wait_for(ledger.exchange.remote(frontend, told), ANSWER_TIMEOUT_S)
        except Exception as error:  # noqa: BLE001  whatever Serve raises: limits hold without it
            leases = None
            if not is_lost:
                logger.warning("the ledger does not answer, limits are shared evenly: %r", error)
        is_lost = leases is None
        accounts.settle(leases, told)
        await asyncio.sleep(EXCHANGE_S)
