"""A link with a delay and a rate: a TCP proxy, in a process of its own so that nothing else waits for it.

    python benchmarks/slow_link.py PORT REAL_PORT DELAY_MS MBIT

Both ports are on 127.0.0.1. DELAY_MS is that of each direction, MBIT per second the rate of each; 0 = none.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time


class _Direction:
    """One way of a link: bytes leave one after the other at its rate, and arrive a delay later."""

    def __init__(self, delay_s: float, bytes_per_s: float):
        self.delay_s, self.bytes_per_s = delay_s, bytes_per_s
        self.free_at = 0.0

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        on_the_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def deliver() -> None:
            while True:
                at, data = await on_the_way.get()
                await asyncio.sleep(at - time.monotonic())
                if not data:
                    writer.close()
                    return
                writer.write(data)
                await writer.drain()

        arriving = asyncio.ensure_future(deliver())
        with contextlib.suppress(ConnectionError):
            data = b"."
            while data:
                data = await reader.read(1 << 16)
                now = time.monotonic()
                self.free_at = max(now, self.free_at)
                if self.bytes_per_s:
                    self.free_at += len(data) / self.bytes_per_s
                on_the_way.put_nowait((self.free_at + self.delay_s, data))
                await asyncio.sleep(self.free_at - now)
        with contextlib.suppress(ConnectionError):
            await arriving


async def _proxy(seen: int, real: int, delay_s: float, bytes_per_s: float) -> None:
    there, back = (_Direction(delay_s, bytes_per_s) for _ in range(2))

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", real)
            await asyncio.gather(there.carry(reader, far_writer), back.carry(far_reader, writer))

    server = await asyncio.start_server(connect, "127.0.0.1", seen)
    print("listening", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    seen_port, real_port, delay, rate = sys.argv[1:]
    asyncio.run(_proxy(int(seen_port), int(real_port), float(delay) / 1000, float(rate) * 1e6 / 8))
