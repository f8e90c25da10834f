"""Lets a process outside a network of namespaces reach a port inside it: a Unix socket for each address and port.

python -m benchmarks.nodes.relay FOLDER HOST:PORT ...      listens on FOLDER/HOST:PORT, and inside passes on
"""

from __future__ import annotations

import asyncio
import sys
from asyncio import StreamReader, StreamWriter
from contextlib import suppress
from functools import partial
from pathlib import Path


async def pass_on(reader: StreamReader, writer: StreamWriter) -> None:
    with suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


async def connect(target: str, outer_reader: StreamReader, outer_writer: StreamWriter) -> None:
    """Both directions, until both ends have said that nothing more comes."""
    host, port = target.split(":")
    try:
        inner_reader, inner_writer = await asyncio.open_connection(host, int(port))
    except OSError:  # nobody listens there: whoever came sees the connection closed
        outer_writer.close()
        return
    await asyncio.gather(pass_on(outer_reader, inner_writer), pass_on(inner_reader, outer_writer))


async def relay(folder: Path, targets: list[str]) -> None:
    for target in targets:
        await asyncio.start_unix_server(partial(connect, target), folder / target)
    print("ready", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(relay(Path(sys.argv[1]), sys.argv[2:]))
