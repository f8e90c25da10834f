"""The ``baton`` command."""

from __future__ import annotations

from app.cli.bench import bench
from app.cli.bench_cache import bench_cache
from app.cli.check import check
from app.cli.edit import edit
from app.cli.entry import run_app, to_app
from app.cli.environments import environments
from app.cli.key import key
from app.cli.profile import profile
from app.cli.run import run
from app.cli.scale import scale
from app.cli.smoke import smoke
from app.cli.status import status
from app.cli.verify import verify

COMMANDS = (run, check, key, environments, status, scale, verify, smoke, bench, bench_cache, edit, profile)


def main() -> None:
    """The entry point ``baton``."""
    run_app(to_app(*COMMANDS, about=__doc__), "baton")


if __name__ == "__main__":
    main()
