#!/usr/bin/env python
"""TextRL's third example: BLOOM-176B learns through a Petals swarm.

With TextRL itself nothing but the value head was ever trained there. The blocks are on servers; this machine
holds the embeddings (7 GB in bf16 for BLOOM-176B), the adapter and the value head. The reward asks for
vowels, which is seen quickly; put your own in its place. launchers/bloom_petals.py says how many servers are
needed, and which commands start them.

    textrl-swarm serve bigscience/bloom --new-swarm    # on a server
    python examples/bloom_176b_swarm.py --initial-peers /ip4/192.0.2.7/tcp/31337/p2p/12D3Koo...
    python examples/bloom_176b_swarm.py --tiny         # a tiny BLOOM on two local servers: a minute

Afterwards: OUTDIR/best holds the adapter in PEFT's format, OUTDIR/scores.txt the evaluations.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
from pathlib import Path

from textrl_swarm import (
    LocalSwarm,
    LoraSettings,
    TextRLActor,
    TextRLEnv,
    load_policy,
    train_agent_with_evaluation,
)
from textrl_swarm.display import accept_any_text
from textrl_swarm.models.tiny import random_bloom

PROMPTS = [{"input": "explain how attention works in a seq2seq model"}, {"input": "the capital of france is"}]


class Vowels(TextRLEnv):
    """The share of vowels in a response."""

    def get_reward(self, input_item, predicted_list, finish):
        if not finish:
            return [0.0] * len(predicted_list)
        texts = [self.tokenizer.convert_tokens_to_string(tokens) for tokens in predicted_list]
        return [sum(letter in "aeiou" for letter in text) / max(1, len(text)) for text in texts]


def main() -> None:
    accept_any_text()  # a terminal that is not UTF-8 shows ? for what it cannot
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="bigscience/bloom-petals", help="what the swarm serves (default: %(default)s)"
    )
    parser.add_argument("--initial-peers", nargs="+", help="addresses as `textrl-swarm serve` prints them")
    parser.add_argument(
        "--tiny", action="store_true", help="a model made on the spot, on two servers of this machine"
    )
    parser.add_argument(
        "--steps", type=int, default=2000, help="env steps: tokens of each sample (default: 2000)"
    )
    parser.add_argument("--outdir", type=Path, default=Path("runs/example_swarm"))
    arguments = parser.parse_args()
    if not arguments.tiny and not arguments.initial_peers:
        parser.error(
            "give --initial-peers ADDRESS (of your own swarm: this example never talks to the public one), "
            "or --tiny"
        )
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    with contextlib.ExitStack() as stack:
        name, peers = arguments.model, arguments.initial_peers
        if arguments.tiny:
            name = random_bloom(arguments.outdir / "tiny")
            print("starting two servers ...", flush=True)
            peers = stack.enter_context(LocalSwarm(name, num_servers=2)).initial_peers
        policy = stack.enter_context(load_policy(name, initial_peers=peers, lora=LoraSettings(r=8, layers=2)))
        env = Vowels(None, policy.tokenizer, observation_input=PROMPTS, max_length=20, compare_sample=8)
        actor = TextRLActor(env, policy, policy.tokenizer, act_deterministically=False, temperature=1.0)
        agent = actor.agent_ppo(
            update_interval=80, minibatch_size=80, epochs=2, lr=1e-4 if not arguments.tiny else 1e-2
        )
        before = actor.predict(PROMPTS[0])[:2]
        train_agent_with_evaluation(
            agent, env, steps=arguments.steps, outdir=str(arguments.outdir),
            eval_n_steps=None, eval_n_episodes=4, eval_interval=max(1, arguments.steps // 4),
        )  # fmt: skip
        agent.load(str(arguments.outdir / "best"))
        print("before:", before)
        print("after: ", actor.predict(PROMPTS[0])[:2])
        print(
            f"{policy.traffic.total_sent / 1e6:.1f} MB sent, "
            f"{policy.traffic.total_received / 1e6:.1f} MB received"
        )


if __name__ == "__main__":
    main()
