"""Swarms that are not open to all, with real servers: lists of peers, a secret, and the servers that a client
trusts.
"""

from __future__ import annotations

import asyncio
import os
import stat

import pytest
from hivemind.p2p import P2P, PeerID
from hivemind.proto import runtime_pb2
from hivemind.utils.timed_storage import get_dht_time
from plain_peft import FAST, connect, fill, random_tokens, run
from test_swarm import assert_same, greedy

from textrl_swarm import LoraSettings, SwarmAccess, load_policy
from textrl_swarm.config import Timeouts
from textrl_swarm.errors import AccessDenied, BlocksUnavailable, ConfigError
from textrl_swarm.swarm.access import AllowList, Door, Membership, ensure_identity, read_peers, read_secret
from textrl_swarm.swarm.client.chain import run_in_background
from textrl_swarm.swarm.client.connection import join, shut_down
from textrl_swarm.swarm.client.survey import survey
from textrl_swarm.swarm.local import LocalSwarm
from textrl_swarm.swarm.stub import ServerStub

A, B = (PeerID.from_base58(name) for name in (
    "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N", "QmaCfSJh287ZJMMUZtYXGnG4nY8NiqZ4FoMf5shqqAYtNA"
))  # fmt: skip


def secret_file(path, content="correct horse battery"):
    path.write_text(content)
    path.chmod(0o600)
    return path


# ------------------------------------------------------------------------------------------- real servers


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """A directory with a secret, the keys of a member and of two servers, and a list of these three."""
    directory = tmp_path_factory.mktemp("keys")
    secret_file(directory / "secret")
    names = [ensure_identity(directory / f"{name}.key") for name in ("member", "server0", "server1")]
    (directory / "allowed").write_text("# us\n" + "".join(f"{name}  # {name}\n" for name in names))
    return directory


@pytest.fixture(scope="module")
def private_swarm(tiny_bloom, keys):
    options = ("--allowed_peers", str(keys / "allowed"), "--secret_file", str(keys / "secret"))

    class Named(LocalSwarm):
        def _launch(self, i, peers, addresses=()):
            self._options = [*options, "--identity_path", str(keys / f"server{i}.key"), *self._stock]
            return super()._launch(i, peers, addresses)

    swarm = Named(tiny_bloom(seed=1), num_servers=2)
    swarm._stock = swarm._options
    with swarm:
        yield swarm


def member(keys, **changes) -> SwarmAccess:
    known = {"secret_file": str(keys / "secret"), "identity": str(keys / "member.key")}
    return SwarmAccess(**{**known, **changes})


def open_policy(swarm, access, discovery_s=5.0):
    timeouts = Timeouts(discovery_s=discovery_s, recovery_s=5)
    policy = load_policy(
        swarm.model,
        initial_peers=swarm.initial_peers,
        lora=LoraSettings(r=4),
        timeouts=timeouts,
        access=access,
    )
    fill(policy, 4)
    return policy


@pytest.mark.swarm
def test_a_member_learns_what_it_learns_in_an_open_swarm(private_swarm, two_servers, keys, as_if_far_away):
    tokens = random_tokens(3, 9)
    with open_policy(private_swarm, member(keys)) as policy, connect(two_servers, filled=4) as other:
        assert_same(run(policy, tokens), run(other, tokens))
        assert greedy(policy, [[5, 6, 7]], 6) == greedy(other, [[5, 6, 7]], 6)
        assert policy._client.chain.hand_overs.round_trip_s, "the servers did not hand over to each other"


@pytest.mark.swarm
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"secret_file": None}, "knows no secret, and this swarm has one"),
        ({"secret_file": "another"}, "knows another secret, and this swarm has one"),
        ({"identity": None}, "is not on this server's list of allowed peers"),
    ],
)
def test_strangers_are_told_why_at_once(private_swarm, keys, tmp_path, changes, reason):
    if changes.get("secret_file") is not None:
        changes = {"secret_file": str(secret_file(tmp_path / "another", "some other secret"))}
    with pytest.raises(
        AccessDenied, match=rf"^server …\w+ does not let this client in: \w+ {reason} \(--[a-z-]+\)$"
    ):
        open_policy(private_swarm, member(keys, **changes), discovery_s=60)
    log = "".join(server.log_path.read_text() for server in private_swarm.servers)
    assert reason in log


@pytest.mark.swarm
def test_no_rpc_serves_strangers(private_swarm):
    """Petals' own neither, nor the DHT's records."""
    dht, p2p = join(private_swarm.initial_peers, FAST.connect_s)
    server = PeerID.from_base58(private_swarm.servers[0].addresses[0].rsplit("/", 1)[1])
    try:
        stub = ServerStub.get_stub(p2p, server)

        async def call(name: str) -> str:
            kind = runtime_pb2.ExpertUID if name == "rpc_info" else runtime_pb2.ExpertRequest

            async def requests():
                yield runtime_pb2.ExpertRequest(uid=f"{private_swarm.dht_prefix}.0")
                await asyncio.sleep(5)

            try:
                if name in ("rpc_info", "rpc_forward", "rpc_backward", "rpc_push"):
                    answer = await asyncio.wait_for(stub_of(p2p, server, name)(kind()), 10)
                else:
                    answer = [one async for one in await stub_of(p2p, server, name)(requests())]
            except Exception as error:
                return str(error)
            return repr(answer)

        def stub_of(p2p: P2P, peer: PeerID, name: str):
            from petals.server.handler import TransformerConnectionHandler as Stock

            return getattr(stub if hasattr(stub, name) else Stock.get_stub(p2p, peer), name)

        for name in (
            "rpc_info", "rpc_forward", "rpc_backward", "rpc_push", "rpc_forward_stream",
            "rpc_backward_stream", "rpc_inference", "rpc_requests", "rpc_generate",
        ):  # fmt: skip
            assert "ACCESS_DENIED" in run_in_background(call(name)), name
    finally:
        shut_down(dht, p2p)


@pytest.mark.swarm
@pytest.mark.parametrize(("swarm_name", "is_seen"), [("private_swarm", False), ("two_servers", True)])
def test_servers_take_records_from_members_only(request, swarm_name, is_seen):
    swarm = request.getfixturevalue(swarm_name)
    key, until = "somebody's", get_dht_time() + 60
    dht, p2p = join(swarm.initial_peers, FAST.connect_s)
    try:
        dht.store(key, subkey=str(dht.peer_id), value=b"mine", expiration_time=until)
    finally:
        shut_down(dht, p2p)
    dht, p2p = join(swarm.initial_peers, FAST.connect_s)  # the one that stored it remembers it
    try:
        assert (dht.get(key, latest=True) is not None) is is_seen
    finally:
        shut_down(dht, p2p)


@pytest.mark.swarm
def test_a_survey_says_which_servers_are_closed(private_swarm, keys):
    def states(access):
        (report,) = survey(private_swarm.initial_peers, access=access)
        return [server.state for server in report.servers]

    assert states(None) == ["closed", "closed"]
    assert states(member(keys)) == ["online", "online"]


@pytest.mark.swarm
def test_only_allowed_servers_are_used(two_servers):
    names = [address.rsplit("/", 1)[1] for address in two_servers.initial_peers]
    with open_policy(two_servers, SwarmAccess(allowed_servers=tuple(names))) as policy:
        run(policy, random_tokens(1, 4))
    with pytest.raises(
        BlocksUnavailable, match=rf"not among allowed_servers \({names[1]}\): add them if you"
    ):
        open_policy(two_servers, SwarmAccess(allowed_servers=(names[0],)), discovery_s=1)


@pytest.mark.swarm
def test_a_server_that_does_not_know_the_secret_is_not_used(two_servers, keys):
    with pytest.raises(AccessDenied, match="does not know this swarm's secret"):
        open_policy(two_servers, member(keys))


@pytest.mark.swarm
def test_a_peer_that_is_taken_off_the_list_is_let_in_no_more(private_swarm, keys):
    allowed = keys / "allowed"
    before = allowed.read_text()
    with open_policy(private_swarm, member(keys)):
        pass
    try:
        allowed.write_text(str(ensure_identity(keys / "server0.key")))
        with pytest.raises(AccessDenied):
            open_policy(private_swarm, member(keys))
    finally:
        allowed.write_text(before)
    with open_policy(private_swarm, member(keys)):
        pass


# -------------------------------------------------------------------------------------------------- parts


def test_a_code_is_good_for_one_pair_of_peers():
    ours, theirs = Membership(b"s" * 32, A), Membership(b"s" * 32, B)
    code = ours.code_for(B)
    assert theirs.is_code_of(A, code)
    assert not theirs.is_code_of(B, code)  # the server cannot use it itself
    assert not ours.is_code_of(A, code)
    assert not Membership(b"t" * 32, B).is_code_of(A, code)
    for nonsense in (None, "", code[:-1], 5, code.encode(), "ü"):
        assert not theirs.is_code_of(A, nonsense)


def test_both_conditions_must_be_met():
    door = Door(frozenset({A.to_base58()}), Membership(b"s" * 32, B))
    door.admit(A)
    door.require_code(A, Membership(b"s" * 32, A).code_for(B))
    with pytest.raises(AccessDenied, match="list of allowed peers"):
        door.admit(B)
    with pytest.raises(AccessDenied, match="knows no secret"):
        door.require_code(A, "")
    with pytest.raises(AccessDenied, match="knows another secret"):
        door.require_code(A, Membership(b"t" * 32, A).code_for(B))


def test_without_a_secret_everybody_knows_it():
    door = Door(None, Membership(None, A))
    door.admit(B)
    door.require_code(B, "")
    door.require_code(B, "anything")
    assert Membership(None, A).greeting(B) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "names no peer, so nobody could come in"),
        ("# only words\n\n", "names no peer, so nobody could come in"),
        (f"{A}\nQm0O\n", "line 2: 'Qm0O' is no peer's id"),
        ("somebody", "line 1: 'somebody' is no peer's id"),
        ("/ip4/127.0.0.1/tcp/1/p2p/" + A.to_base58(), "is no peer's id; it is what follows /p2p/"),
        ("x" * (1 << 20) + "x", "larger than 1048576 bytes"),
    ],
)
def test_lists_that_are_none(tmp_path, content, message):
    path = tmp_path / "list"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_peers(path)


@pytest.mark.parametrize("read", [read_peers, read_secret, AllowList])
def test_files_that_are_not_there(tmp_path, read):
    with pytest.raises(ConfigError, match="none cannot be read: No such file or directory"):
        read(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"is not a file|Is a directory"):
        read(tmp_path)


def test_a_list_may_change(tmp_path):
    path = tmp_path / "list"
    path.write_text(A.to_base58())
    allowed = AllowList(path)
    assert A.to_base58() in allowed
    assert B.to_base58() not in allowed
    path.write_text(f"{A}\n{B}\n")
    assert B.to_base58() in allowed
    path.unlink()
    assert B.to_base58() in allowed  # as it was


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o620, 0o604])
def test_keys_that_others_can_get_at_are_refused(tmp_path, mode):
    path = secret_file(tmp_path / "secret")
    path.chmod(mode)
    key = tmp_path / "key"
    ensure_identity(key)
    os.chmod(key, mode)
    for read in (read_secret, ensure_identity):
        with pytest.raises(ConfigError, match=rf"\(mode {mode:o}\): chmod 600 {tmp_path}"):
            read(path if read is read_secret else key)


def test_a_short_secret_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"holds 5 characters, too few .* openssl rand"):
        read_secret(secret_file(tmp_path / "secret", "hello\n"))


def test_a_new_key_is_never_readable_by_others(tmp_path, monkeypatch):
    modes = []
    chmod = os.chmod

    def watched(path, mode, **options):
        modes.append(stat.S_IMODE(os.stat(path).st_mode))  # what it was before
        chmod(path, mode, **options)

    monkeypatch.setattr(os, "chmod", watched)
    before = os.umask(0)
    try:
        peer = ensure_identity(tmp_path / "key")
    finally:
        os.umask(before)
    assert modes == [0o600]
    assert ensure_identity(tmp_path / "key") == peer


@pytest.mark.parametrize(("content", "message"), [(b"", "no private key"), (b"nonsense", "no private key")])
def test_keys_that_are_none(tmp_path, content, message):
    path = tmp_path / "key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=message):
        ensure_identity(path)
    with pytest.raises(ConfigError, match="cannot be made"):
        ensure_identity(tmp_path / "no directory" / "key")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"allowed_servers": "Qm"}, "must be a list of ids"),
        ({"allowed_servers": ("short",)}, "'short' is no peer's id"),
        ({"allowed_servers": (5,)}, "5 is no peer's id"),
        ({"secret_file": ""}, "secret_file must be a path"),
        ({"identity": 5}, "identity must be a path"),
    ],
)
def test_settings_that_are_impossible(settings, message):
    with pytest.raises(ConfigError, match=message):
        SwarmAccess(**settings)


def test_a_missing_secret_is_noticed_before_anything_is_loaded(tiny_bloom, tmp_path, monkeypatch):
    monkeypatch.setattr("textrl_swarm.swarm.client.parts.load_parts", None)
    address = f"/ip4/127.0.0.1/tcp/1/p2p/{A}"
    with pytest.raises(ConfigError, match="none cannot be read"):
        load_policy(
            tiny_bloom(seed=1),
            initial_peers=[address],
            access=SwarmAccess(secret_file=str(tmp_path / "none")),
        )


def test_access_is_for_swarms(tiny_bloom):
    with pytest.raises(ConfigError, match=r"access=.* is for a model in a swarm"):
        load_policy(tiny_bloom(seed=1), access=SwarmAccess())
