"""The RPCs of a server as a client calls them: their signatures and their names on the wire.

hivemind derives a client's stub from the signatures of a class, so the client needs such a class but none of
the server's code. Knows nothing about what the RPCs do; see server/handler.py.
"""

from __future__ import annotations

from typing import AsyncIterator  # noqa: UP035 - hivemind recognises streams by typing's own name

from hivemind.p2p import P2PContext
from hivemind.p2p.servicer import ServicerBase
from hivemind.proto import runtime_pb2

Requests = AsyncIterator[runtime_pb2.ExpertRequest]
Responses = AsyncIterator[runtime_pb2.ExpertResponse]

_OUR_RPCS = ("rpc_generate", "rpc_requests")


def wire_name(namespace: str | None, method: str) -> str:
    """The name that client and server use for an RPC; petals' own RPCs keep petals' names, for stock
    clients.
    """
    owner = "LoraHandler" if method in _OUR_RPCS else "TransformerConnectionHandler"
    name = f"{owner}.{method}"
    return name if namespace is None else f"{namespace}::{name}"


class ServerStub(ServicerBase):
    """`ServerStub.get_stub(p2p, peer)` calls these RPCs of a server; nobody instantiates this class
    itself.
    """

    @classmethod
    def _get_handle_name(cls, namespace: str | None, method_name: str) -> str:
        return wire_name(namespace, method_name)

    async def rpc_info(self, request: runtime_pb2.ExpertUID, context: P2PContext) -> runtime_pb2.ExpertInfo:
        """What a server says about itself."""
        raise NotImplementedError

    async def rpc_requests(self, requests: Requests, context: P2PContext) -> Responses:
        """Adapters to store, forward and backward passes, one after the other."""
        raise NotImplementedError

    async def rpc_generate(self, requests: Requests, context: P2PContext) -> Responses:
        """Generation with the caches on the server."""
        raise NotImplementedError
