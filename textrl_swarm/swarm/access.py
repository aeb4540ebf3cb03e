"""Who takes part in a swarm: peers on a list, those who know a secret, or everybody.

A peer's id is the hash of its public key, and connections prove that the other side has the private one; so a
list of ids needs no accounts. Who knows the secret proves it with a code that is good for one pair of peers
only, so that a server cannot use what a client showed it. Knows nothing about models.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import stat
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from hivemind.p2p import P2P, PeerID
from hivemind.proto import runtime_pb2

from textrl_swarm.errors import ConfigError
from textrl_swarm.swarm.protocol import JOINING, PROOF, access_denied

logger = logging.getLogger(__name__)

_LEAST_SECRET_BYTES = 16
_MAX_FILE_BYTES = 1 << 20
_MAKE_SECRET = "(umask 077; openssl rand -hex 32 > FILE)"


def read_secret(path: str | Path | None) -> bytes | None:
    """Of a swarm, a line of text; None = it has none.

    Raises:
        ConfigError: the file cannot be read, others can read it too, or it holds too little.
    """
    if path is None:
        return None
    require_private(path)
    secret = _read(path).strip()
    if len(secret) < _LEAST_SECRET_BYTES:
        raise ConfigError(
            f"{path} holds {len(secret)} characters, too few for a secret; make one with {_MAKE_SECRET}"
        )
    return secret


def require_private(path: str | Path) -> None:
    """Raises ConfigError for a file that other users of this machine can read or change, or that is none."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        raise ConfigError(f"{path} is not a file")
    if stat.S_IMODE(mode) & 0o077:
        raise ConfigError(
            f"{path} holds a key, and others can get at it (mode {stat.S_IMODE(mode):o}): chmod 600 {path}"
        )


def ensure_identity(path: str | Path) -> PeerID:
    """The id of the peer whose private key is in this file; makes the file when there is none.

    Raises:
        ConfigError: the file cannot be read or made, others can read it too, or it holds no key.
    """
    path = Path(path)
    if not path.exists():
        before = os.umask(0o077)  # hivemind's own mode comes after the key is written
        try:
            P2P.generate_identity(str(path))
        except OSError as error:
            raise ConfigError(f"{path} cannot be made: {error.strerror or error}") from error
        finally:
            os.umask(before)
    require_private(path)
    try:
        return PeerID.from_identity(_read(path))
    except Exception as error:  # whatever parsing a stranger's bytes as a key raises
        raise ConfigError(f"{path} holds no private key of a peer: {error!r}") from error


def read_peers(path: str | Path) -> frozenset[str]:
    """Ids of peers from a file: one in each line, with comments behind #.

    Raises:
        ConfigError: the file cannot be read, names nobody, or has a line that is no id.
    """
    peers = set()
    for i, line in enumerate(_read(path).decode(errors="replace").splitlines(), 1):
        name = line.partition("#")[0].strip()
        if name:
            peers.add(checked_peer(name, f"{path}, line {i}"))
    if not peers:
        raise ConfigError(f"{path} names no peer, so nobody could come in; write one id in each line")
    return frozenset(peers)


def checked_peer(name: str, where: str) -> str:
    """Raises ConfigError for what is no peer's id."""
    try:
        if PeerID.from_base58(name).to_base58() == name and len(name) >= 30:
            return name
    except ValueError:
        pass
    raise ConfigError(
        f"{where}: {name!r} is no peer's id; it is what follows /p2p/ in an address, and what "
        "`textrl-swarm peer-id FILE` prints"
    )


def _read(path: str | Path) -> bytes:
    try:
        with open(path, "rb") as file:
            content = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    if len(content) > _MAX_FILE_BYTES:
        raise ConfigError(f"{path} is larger than {_MAX_FILE_BYTES} bytes")
    return content


class AllowList:
    """The peers that a file names; the file may change while the server runs.

    Raises:
        ConfigError: as `read_peers`.
    """

    def __init__(self, path: str | Path):
        self._path = path
        self._peers = read_peers(path)
        self._changed = self._stamp()

    def _stamp(self) -> tuple[int, int]:
        try:
            found = os.stat(self._path)
        except OSError:
            return 0, 0
        return found.st_mtime_ns, found.st_size

    def __contains__(self, peer: str) -> bool:
        stamp = self._stamp()
        if stamp != self._changed:
            self._changed = stamp
            try:
                self._peers = read_peers(self._path)
            except ConfigError as error:
                logger.error("the list of allowed peers stays as it was: %s", error)
        return peer in self._peers


def _code(secret: bytes, prover: PeerID, verifier: PeerID) -> str:
    names = f"textrl-swarm {prover.to_base58()} {verifier.to_base58()}"
    return hmac.new(secret, names.encode(), hashlib.sha256).hexdigest()


class Membership:
    """How this machine proves to others that it knows the secret, and sees that they do.

    Args:
        secret: None = there is none, and everybody is a member.
        me: this machine's peer.
    """

    def __init__(self, secret: bytes | None, me: PeerID):
        self._secret = secret
        self._me = me

    @property
    def has_secret(self) -> bool:
        """Whether there is one to know."""
        return self._secret is not None

    def code_for(self, peer: PeerID) -> str | None:
        """What proves to this peer, and to no other, that this machine is a member."""
        return None if self._secret is None else _code(self._secret, self._me, peer)

    def is_code_of(self, peer: PeerID, code: Any) -> bool:
        """Whether this proves that the peer is a member."""
        if self._secret is None:
            return True
        return isinstance(code, str) and hmac.compare_digest(
            code.encode(), _code(self._secret, peer, self._me).encode()
        )

    def greeting(self, peer: PeerID) -> runtime_pb2.ExpertRequest | None:
        """The first message of a stream to a peer."""
        code = self.code_for(peer)
        return None if code is None else runtime_pb2.ExpertRequest(uid=f"{JOINING}{code}")

    def asked(self, uid: str, peer: PeerID) -> str:
        """The uid of a block in a request that has nothing but it."""
        code = self.code_for(peer)
        return uid if code is None else f"{uid}{JOINING}{code}"

    def knows(self, peer: PeerID, info: Mapping[str, Any]) -> bool:
        """Whether a server's answer to rpc_info proves that it is a member."""
        return self.is_code_of(peer, info.get(PROOF))


class Door:
    """Whom a server lets in; a peer must meet each condition that there is.

    Args:
        allowed: ids of peers; None = all.
        membership: with the secret, if there is one.
    """

    def __init__(self, allowed: Collection[str] | AllowList | None, membership: Membership):
        self._allowed = allowed
        self.membership = membership

    def admit(self, peer: PeerID) -> None:
        """Raises AccessDenied for a peer that may not come in, whatever it knows."""
        if self._allowed is not None and peer.to_base58() not in self._allowed:
            raise access_denied(f"{peer} is not on this server's list of allowed peers (--allowed-peers)")

    def require_code(self, peer: PeerID, code: str | None) -> None:
        """Raises AccessDenied when this is no proof that the peer knows the secret."""
        if not self.membership.is_code_of(peer, code):
            secret = "another secret" if code else "no secret"
            raise access_denied(f"{peer} knows {secret}, and this swarm has one (--secret-file)")
