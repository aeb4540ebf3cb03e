"""Models of other families through real Petals servers: forward, gradients, generation with an adapter, and
the loss of a server equal plain transformers and PEFT.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from families import BLOCKS, FAMILIES, REFUSED, VOCAB, random_checkpoint
from plain_peft import PlainPeft, assert_same, connect, difference, greedy, run
from transformers import AutoConfig, AutoModelForCausalLM

from textrl_swarm.config import LoraSettings
from textrl_swarm.errors import ModelError
from textrl_swarm.models.layers import expert_layers
from textrl_swarm.policies.loading import load_policy
from textrl_swarm.swarm.local import LocalSwarm

pytestmark = [pytest.mark.swarm, pytest.mark.filterwarnings("ignore::UserWarning")]

# Dense, sliding windows and experts, a latent cache, states. The others are `slow`.
KINDS = ("llama", "gpt_oss", "deepseek_v3", "qwen3_next")
# The indexer of DeepSeek V3.2 gets no gradient: plain PEFT gives None where servers give zeros.
NOT_COMPARED = ("deepseek_v32",)
MODELS = [
    family if family in KINDS else pytest.param(family, marks=pytest.mark.slow)
    for family in FAMILIES
    if family not in NOT_COMPARED
]

# PEFT refuses the output projection of Mamba's layers.
NO_OUT_PROJ = LoraSettings(r=4, targets=("in_proj",))
TARGETS = dict.fromkeys(
    ("mamba", "mamba2", "falcon_h1", "bamba", "granitemoehybrid", "jamba", "nemotron_h"), NO_OUT_PROJ
)

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
def test_a_swarm_equals_plain_transformers_and_peft(swarm_of, family, tmp_path):
    swarm = swarm_of(family)
    assert_swarm_equals_plain(swarm, TARGETS.get(family, LoraSettings(r=4)), tmp_path)
    matrices = experts_of(swarm.model)
    if matrices:
        # Tokens pass through A and B; PEFT makes new matrices. The same but for rounding, which Qwen3-Next's
        # linear attention enlarges: another last bit in its embeddings changes gradients by 1.3e-4.
        experts = LoraSettings(r=2, targets=tuple(sorted(matrices)))
        assert_swarm_equals_plain(swarm, experts, tmp_path, tolerance=5e-4)


def experts_of(directory: Path) -> set[str]:
    """The targets that stand for a model's routed experts."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    return {".".join(path.split(".")[-2:]) for path in expert_layers(model)}


def assert_swarm_equals_plain(
    swarm: LocalSwarm, lora: LoraSettings, tmp_path: Path, tolerance: float = 1e-5
) -> None:
    with connect(swarm, lora, filled=3) as policy:
        plain = PlainPeft(policy, tmp_path / "adapter")
        assert_same(run(policy, tokens()), plain.run(tokens()), tolerance)
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


@pytest.mark.slow  # two more servers
@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_next"])
def test_a_replica_takes_over_in_the_middle_of_a_generation(tmp_path, family):
    directory = random_checkpoint(family, tmp_path / family)
    spans = [(0, 2), (2, BLOCKS), (2, BLOCKS)]
    with LocalSwarm(directory, spans=spans) as swarm, connect(swarm, filled=3) as policy:
        undisturbed = greedy(policy, PROMPTS, 12)
        with policy.session(1, 40) as session:
            first = [session.step(tokens(1, length)) for length in (6, 1, 1)]
            used = {str(leg.span.peer) for leg in session._session._legs}
            (lost,) = (i for i in (1, 2) if swarm.servers[i].addresses[0].rsplit("/", 1)[1] in used)
            swarm.kill(lost)
            rest = [session.step(tokens(1, 1)) for _ in range(3)]
        with policy.session(1, 40) as session:
            again = [session.step(tokens(1, length)) for length in (6, 1, 1, 1, 1, 1)]
        assert all(torch.equal(a, b) for a, b in zip([*first, *rest], again, strict=True))
        assert greedy(policy, PROMPTS, 12) == undisturbed


@pytest.mark.parametrize("family", [family for family in REFUSED if family != "recurrent_gemma"])
def test_models_that_cannot_be_served_are_refused_at_the_door(tmp_path, family):
    config = AutoConfig.for_model(family, **REFUSED[family])
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"never read")
    address = "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWBFuXq8Lr1NqkCfUqkmvFGVaXGPBzvwLzNS4F9s4tXdBT"
    with pytest.raises(ModelError, match=r"cannot be served one by one|only decoders can be cut"):
        LocalSwarm(tmp_path)
    with pytest.raises(ModelError, match=r"cannot be served one by one|only decoders can be cut"):
        load_policy(Path(tmp_path), initial_peers=[address])
