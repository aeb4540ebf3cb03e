"""A link with a delay and a rate, which can break: a TCP proxy, in a process of its own so that nothing else
waits for it.

    python benchmarks/slow_link.py PORT REAL_PORT DELAY_MS MBIT

Both ports are on 127.0.0.1. DELAY_MS is that of each direction, MBIT per second the rate of each; 0 = none.
Takes words on standard input, a line each: `cut` resets all connections, `part` does and takes no new ones,
`stall` carries nothing more and keeps connections open, `heal` makes an end of all that.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time


class _Direction:
    """One way of a link: bytes leave one after the other at its rate, and arrive a delay later."""

    def __init__(self, delay_s: float, bytes_per_s: float, flowing: asyncio.Event):
        self.delay_s, self.bytes_per_s = delay_s, bytes_per_s
        self.free_at = 0.0
        self.flowing = flowing

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        on_the_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def deliver() -> None:
            while True:
                at, data = await on_the_way.get()
                await asyncio.sleep(at - time.monotonic())
                await self.flowing.wait()
                if not data:
                    writer.close()
                    return
                writer.write(data)
                await writer.drain()

        async def read() -> bytes:
            with contextlib.suppress(ConnectionError):
                return await reader.read(1 << 16)
            return b""  # it was reset: an end as any other

        arriving = asyncio.ensure_future(deliver())
        with contextlib.suppress(ConnectionError):
            data = b"."
            while data:
                data = await read()
                now = time.monotonic()
                self.free_at = max(now, self.free_at)
                if self.bytes_per_s:
                    self.free_at += len(data) / self.bytes_per_s
                on_the_way.put_nowait((self.free_at + self.delay_s, data))
                await asyncio.sleep(self.free_at - now)
        with contextlib.suppress(ConnectionError):
            await arriving


async def _proxy(seen: int, real: int, delay_s: float, bytes_per_s: float) -> None:
    flowing, is_open = asyncio.Event(), True
    flowing.set()
    there, back = (_Direction(delay_s, bytes_per_s, flowing) for _ in range(2))
    ends: set[asyncio.StreamWriter] = set()
    running: set[object] = set()  # asyncio itself does not keep the tasks of lost connections

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        mine, task = {writer}, asyncio.current_task()
        ends.update(mine)
        running.add(task)
        try:
            if is_open:
                far_reader, far_writer = await asyncio.open_connection("127.0.0.1", real)
                mine.add(far_writer)
                ends.update(mine)
                await asyncio.gather(there.carry(reader, far_writer), back.carry(far_reader, writer))
        except ConnectionError:
            pass
        finally:
            running.discard(task)
            ends.difference_update(mine)
            for end in mine:
                end.transport.abort()

    def obey() -> None:
        nonlocal is_open
        words = os.read(sys.stdin.fileno(), 1 << 10).decode().split()
        if not words:
            asyncio.get_running_loop().remove_reader(sys.stdin)
        for word in words:
            is_open = word != "part"
            if word == "stall":
                flowing.clear()
            else:
                flowing.set()
            if word in ("cut", "part"):
                for end in list(ends):
                    end.transport.abort()

    server = await asyncio.start_server(connect, "127.0.0.1", seen)
    asyncio.get_running_loop().add_reader(sys.stdin, obey)
    print("listening", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    seen_port, real_port, delay, rate = sys.argv[1:]
    asyncio.run(_proxy(int(seen_port), int(real_port), float(delay) / 1000, float(rate) * 1e6 / 8))
