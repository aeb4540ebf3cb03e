"""Models of other families through real Petals servers: forward, gradients, generation with an adapter, and
the loss of a server equal plain transformers and PEFT.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch
from families import BLOCKS, FAMILIES, REFUSED, VOCAB, random_checkpoint
from plain_peft import PlainPeft, assert_same, connect, difference, fill, greedy, is_used, run, two_steps
from transformers import AutoConfig, AutoModelForCausalLM

from textrl_swarm.config import LoraSettings, PPOConfig, SamplingConfig, ServerChecks
from textrl_swarm.errors import ModelError
from textrl_swarm.learning.learner import Learner
from textrl_swarm.models.layers import expert_layers
from textrl_swarm.policies.base import Policy
from textrl_swarm.policies.loading import load_policy
from textrl_swarm.swarm.local import LocalSwarm
from textrl_swarm.types import RolloutBatch

pytestmark = [pytest.mark.swarm, pytest.mark.filterwarnings("ignore::UserWarning")]

# Sliding windows and experts, a latent cache, states, indices that travel between blocks; all but the first
# are `slow`, like the rest.
KINDS = ("gpt_oss", "deepseek_v3", "qwen3_next", "glm_moe_dsa")
MODELS = [
    family if family in KINDS[:1] else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES
]
# Indexers of sparse attention get no gradient: plain PEFT gives None where servers give zeros.
NO_INDEXER = LoraSettings(r=4, targets=("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"))
TARGETS = {"deepseek_v32": NO_INDEXER, "glm_moe_dsa": NO_INDEXER}

# A PPO update through a swarm is compared with one on this machine: these kinds, a dense one, and one with
# states beside keys and values in each block.
UPDATED = (*KINDS, "llama", "falcon_h1")

PROMPTS = [[5, 17, 60, 7, 8, 9, 30, 31, 32, 33, 34], [40, 41, 42]]


def tokens(rows: int = 2, length: int = 13) -> torch.Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def swarm_of(tmp_path_factory) -> Iterator[Callable[[str], LocalSwarm]]:
    """A swarm of two servers per family; only the last one runs."""
    running: dict[str, LocalSwarm] = {}

    def get(family: str) -> LocalSwarm:
        if family not in running:
            for swarm in running.values():
                swarm.close()
            running.clear()
            directory = random_checkpoint(family, tmp_path_factory.mktemp("models") / family)
            running[family] = LocalSwarm(directory, num_servers=2).__enter__()
        return running[family]

    yield get
    for swarm in running.values():
        swarm.close()


@pytest.mark.parametrize("family", MODELS)
def test_a_swarm_equals_plain_transformers_and_peft(swarm_of, family, tmp_path, record_property):
    """What is recorded is the table in docs/families.md: pytest --junitxml=families.xml"""
    swarm = swarm_of(family)
    lora = TARGETS.get(family, LoraSettings(r=4))
    record_property("linear layers", assert_swarm_equals_plain(swarm, lora, tmp_path))
    matrices = experts_of(swarm.model)
    if matrices:
        # Tokens pass through A and B; PEFT makes new matrices. The same but for rounding, which Qwen3-Next's
        # linear attention enlarges: another last bit in its embeddings changes gradients by 1.3e-4.
        experts = LoraSettings(r=2, targets=tuple(sorted(matrices)))
        measured = assert_swarm_equals_plain(swarm, experts, tmp_path, tolerance=5e-4)
        record_property("routed experts", measured)
    if family in UPDATED:
        assert_update_equals_local(swarm, lora)
        assert_swarm_equals_plain(swarm, lora, tmp_path, local_blocks=(1, 1))


@pytest.mark.slow  # two servers each
@pytest.mark.parametrize("family", KINDS)
def test_honest_servers_of_other_kinds_are_believed(swarm_of, family, caplog):
    """Sliding windows, routers, latent caches, states, and indices between blocks, computed again here."""
    swarm = swarm_of(family)
    lora = TARGETS.get(family, LoraSettings(r=4, targets=("q_proj", *sorted(experts_of(swarm.model)))))
    if family == "deepseek_v3":
        lora = NO_INDEXER
    with load_policy(
        swarm.model,
        initial_peers=swarm.initial_peers,
        lora=lora,
        checks=ServerChecks(rate=1.0, here=True),
    ) as policy:
        updated(policy)
        worst = policy._client.chain.checks.worst
        assert worst.keys() >= {"forward", "generation", "gradient"}
        assert max(worst.values()) < 0.2
    assert "refuted" not in caplog.text and "cannot be checked" not in caplog.text


def experts_of(directory: Path) -> set[str]:
    """The targets that stand for a model's routed experts."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    return {".".join(path.split(".")[-2:]) for path in expert_layers(model)}


def assert_update_equals_local(swarm: LocalSwarm, lora: LoraSettings) -> None:
    with connect(swarm, lora) as policy, load_policy(swarm.model, lora=lora) as local:
        (found, parameters), (expected, expected_parameters) = updated(policy), updated(local)
    assert torch.equal(found.tokens, expected.tokens)
    assert found.tokens.shape[1] > max(map(len, PROMPTS))
    assert parameters.keys() == expected_parameters.keys()
    assert_equal(parameters.values(), expected_parameters.values())


def assert_swarm_equals_plain(
    swarm: LocalSwarm,
    lora: LoraSettings,
    tmp_path: Path,
    tolerance: float = 1e-5,
    local_blocks: tuple[int, int] | None = None,
) -> tuple[float, float, float]:
    """Returns the differences of logits, of gradients, and of the hidden states of a cached generation."""
    with connect(swarm, lora, filled=3, local_blocks=local_blocks) as policy:
        plain = PlainPeft(policy, tmp_path / "adapter")
        logits, grads = assert_same(run(policy, tokens()), plain.run(tokens()), tolerance)
        row = tokens(1, 13)
        with policy.session(1, 13) as session:
            states = torch.cat([session.step(chunk) for chunk in row.split((6, 1, 1, 5), dim=1)], dim=1)
        cached = difference(states, plain.hidden(row))
        assert cached < 1e-3  # other shapes of products; a token forgotten makes about 1
        assert greedy(policy, PROMPTS, 10) == [plain.greedy(prompt, 10) for prompt in PROMPTS]
        with torch.no_grad():
            on = policy(tokens()).logits
            with policy.adapter_disabled(), plain.model.disable_adapter():
                off, base = policy(tokens()).logits, plain.model(tokens()).logits
            assert difference(off, base) < 1e-5
            assert difference(on, base) > 1e-2, "the adapter changes nothing, so this test shows nothing"
            for parameter in policy.adapter_parameters().values():
                parameter.mul_(1.5)
        changed = PlainPeft(policy, tmp_path / "changed")
        assert_same(run(policy, tokens()), changed.run(tokens()), tolerance)
        with load_policy(swarm.model, lora=lora) as local:
            assert local.adapter_parameters().keys() == policy.adapter_parameters().keys()
            local.load_adapter(tmp_path / "changed")
            assert_same(run(policy, tokens()), run(local, tokens()))
    return logits, grads, cached


def updated(policy: Policy) -> tuple[RolloutBatch, dict[str, torch.Tensor]]:
    """A rollout, and the parameters after one PPO update on it."""
    fill(policy, 3)
    learner = Learner(policy, PPOConfig(lr=1e-2, epochs=2), SamplingConfig(max_new_tokens=8, seed=5))
    rollout = policy.generate(PROMPTS, learner.rollout_sampling())
    rewards = torch.zeros(rollout.response_mask.shape)
    rewards[torch.arange(len(PROMPTS)), rollout.response_lengths - 1] = torch.tensor([1.0, -0.5])
    learner.learn(rollout, rewards)
    return rollout, {name: one.detach().clone() for name, one in policy.trainable_parameters().items()}


def generated(policy: Policy, disturb: Callable[[int], object]) -> list[torch.Tensor]:
    """Hidden states of a session's steps; `disturb` is called before each."""
    with policy.session(1, 40) as session:
        states = []
        for step, length in enumerate((6, 1, 1, 1, 1, 1)):
            disturb(step)
            states.append(session.step(tokens(1, length)))
        return states


@pytest.mark.slow  # three more servers each
@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_next"])
def test_faults_go_unnoticed(tmp_path, family):
    """A mixture and a hybrid: a replica takes over, the only server comes back, adapters are evicted."""
    directory = random_checkpoint(family, tmp_path / family)
    lora = LoraSettings(r=2, targets=("q_proj", *sorted(experts_of(directory))))
    with load_policy(directory, lora=lora) as policy:
        size_bytes = sum(4 * parameter.numel() for parameter in policy.adapter_parameters().values())
    room = 3 * size_bytes // 4  # of a server with half of the blocks: one and a half
    options = ("--adapter_bytes", room, "--adapter_bytes_per_client", room, "--adapter_idle_s", 0)
    spans = [(0, 2), (2, BLOCKS), (2, BLOCKS)]
    with LocalSwarm(directory, spans=spans, server_options=tuple(map(str, options))) as swarm:
        with connect(swarm, lora, filled=3) as policy:
            calm_states = generated(policy, lambda step: None)
            calm_parameters = two_steps(policy, tokens())

        with connect(swarm, lora, filled=3) as policy, connect(swarm, lora) as other:
            seeds = iter(range(100, 200))
            sent = policy.traffic.sent["adapters"]

            def crowd_out(_: object) -> None:
                fill(other, next(seeds))
                with torch.no_grad():
                    other(tokens(1, 2))

            assert_equal(generated(policy, crowd_out), calm_states)
            pushed = policy.traffic.sent["adapters"] - sent
            assert pushed >= 5 * size_bytes, "it was not evicted, so this test shows nothing"
            assert_equal(two_steps(policy, tokens(), crowd_out).values(), calm_parameters.values())

        with connect(swarm, lora, filled=3) as policy:

            def kill_the_used(step: int) -> None:
                if step == 3:
                    swarm.kill(1 if is_used(policy, swarm.servers[1]) else 2)

            assert_equal(generated(policy, kill_the_used), calm_states)
            left = next(i for i in (1, 2) if swarm.servers[i].running)
            threads = []

            def restart_the_last(moment: object) -> None:
                if moment in (3, "before backward 1"):
                    swarm.kill(left)
                    threads.append(threading.Thread(target=swarm.start, args=(left,)))
                    threads[-1].start()

            assert_equal(generated(policy, restart_the_last), calm_states)
            threads[0].join()
            assert_equal(two_steps(policy, tokens(), restart_the_last).values(), calm_parameters.values())
            threads[1].join()


def assert_equal(found: Iterable[torch.Tensor], expected: Iterable[torch.Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("family", REFUSED)
def test_models_that_cannot_be_served_are_refused_at_the_door(tmp_path, family):
    config = AutoConfig.for_model(family, **REFUSED[family])
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"never read")
    address = "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWBFuXq8Lr1NqkCfUqkmvFGVaXGPBzvwLzNS4F9s4tXdBT"
    with pytest.raises(ModelError, match=r"cannot be served one by one|only decoders can be cut"):
        LocalSwarm(tmp_path)
    with pytest.raises(ModelError, match=r"cannot be served one by one|only decoders can be cut"):
        load_policy(Path(tmp_path), initial_peers=[address])
