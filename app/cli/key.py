"""``baton key``: make an API key."""

from __future__ import annotations

from typing import Annotated

import typer

from app.tenants import entry, new_key


def key(
    tenant: Annotated[str, typer.Argument(help="Whose key it is.")],
    admin: Annotated[bool, typer.Option("--admin", help="It opens every route.")] = False,
) -> None:
    """Make an API key: it goes to standard error, and its entry for the file that security.keys names to the output.

    The key itself is kept nowhere, and its entry does not tell it.
    """
    made = new_key()
    listed = entry(tenant, made, admin=admin)
    typer.echo(f"The key of {tenant}, which is shown only now: {made}", err=True)
    typer.echo(listed, nl=False)
