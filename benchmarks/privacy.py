"""How much of a text the server with the first blocks can read, with and without local blocks.

    python benchmarks/privacy.py

Two attackers have the public model, and the hidden states that the first server gets of 32 texts:

- lookup: the token whose embedding is nearest (cosine), which takes no computing;
- search: from left to right, each token of the vocabulary is tried behind the text found so far, computed
  through the client's blocks, and the nearest is taken.

With an adapter, the client's own blocks have been trained for 30 updates, and no server has ever seen that
part of it; the attackers compute without. The model is the demo's.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from harness import report
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from textrl_swarm import LoraSettings, PPOConfig, SamplingConfig, load_policy
from textrl_swarm.learning.learner import Learner
from textrl_swarm.models.corpus import DEMO_PROMPTS, opinion
from textrl_swarm.models.tiny import make_tiny_bloom
from textrl_swarm.policies.base import Policy

UPDATES, TEXTS = 30, 32


def main() -> None:
    torch.set_num_threads(1)
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as directory:
        model = make_tiny_bloom(Path(directory) / "bloom")
        lora = LoraSettings(r=8)
        with load_policy(model, lora=lora) as policy:
            texts = policy.generate(DEMO_PROMPTS, SamplingConfig(max_new_tokens=16, num_samples=4, seed=1))
            train(policy)
            policy.save_adapter(adapter := Path(directory) / "adapter")
        base, another = (
            AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval() for _ in range(2)
        )
        trained = PeftModel.from_pretrained(another, str(adapter)).eval()
    plain, adapted = hidden_states(base, texts.tokens), hidden_states(trained, texts.tokens)
    lengths = texts.prompt_lengths + texts.response_lengths
    mask = (torch.arange(texts.tokens.shape[1])[None] < lengths[:, None])[:TEXTS]
    tokens = texts.tokens[:TEXTS]
    rows = []
    for kept in range(len(plain)):
        row: list[object] = [kept]
        for states in (plain, adapted):
            for attack in (lookup, search):
                found = attack(base, states[kept][:TEXTS], kept)
                row.append(f"{(found == tokens)[mask].float().mean():.1%}")
        rows.append(row)
    report(
        "Tokens that the first server recovers",
        ["local blocks in front", "lookup", "search", "trained: lookup", "trained: search"],
        rows,
    )


def hidden_states(model: torch.nn.Module, tokens: Tensor) -> list[Tensor]:
    """What servers get with 0, 1, ... local blocks in front, each (B, S, H)."""
    with torch.no_grad():
        return list(model(input_ids=tokens, output_hidden_states=True).hidden_states[:-1])


def train(policy: Policy) -> None:
    sampling = SamplingConfig(max_new_tokens=16, num_samples=8, seed=2)
    learner = Learner(policy, PPOConfig(lr=3e-3, epochs=4, kl_coef=0.05, minibatch_size=16), sampling)
    for _ in range(UPDATES):
        rollout = policy.generate(DEMO_PROMPTS, learner.rollout_sampling())
        rewards = torch.zeros(rollout.response_mask.shape)
        scores = torch.tensor([opinion(text) for text in rollout.texts])
        rewards[torch.arange(len(scores)), rollout.response_lengths - 1] = scores
        learner.learn(rollout, rewards)


def lookup(model: torch.nn.Module, seen: Tensor, kept: int) -> Tensor:
    vocabulary = torch.arange(model.config.vocab_size)[:, None]
    embedded = hidden_states(model, vocabulary)[0][:, 0]
    return nearest(seen, embedded[None, None])


def search(model: torch.nn.Module, seen: Tensor, kept: int) -> Tensor:
    size = model.config.vocab_size
    found = torch.empty(seen.shape[:2], dtype=torch.int64)
    for row, states in enumerate(seen):
        for column in range(len(states)):
            tried = torch.cat([found[row, :column].expand(size, -1), torch.arange(size)[:, None]], dim=1)
            reached = hidden_states(model, tried)[kept][:, -1]
            found[row, column] = nearest(states[column], reached)
    return found


def nearest(seen: Tensor, candidates: Tensor) -> Tensor:
    """Index of the candidate (..., V, H) most like what was seen (..., H)."""
    return torch.cosine_similarity(seen[..., None, :], candidates, dim=-1).argmax(-1)


if __name__ == "__main__":
    main()
