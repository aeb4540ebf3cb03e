"""What a sender does, written down as a list."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable
from typing import Any


async def scripted(items: Iterable[Any]) -> AsyncGenerator[Any, None]:
    """The items in their order; a float is a pause of so many seconds, an error is raised."""
    for item in items:
        if isinstance(item, float):
            await asyncio.sleep(item)
        elif isinstance(item, Exception):
            raise item
        else:
            yield item
