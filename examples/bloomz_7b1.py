#!/usr/bin/env python
"""TextRL's second example: bloomz-7b1-mt learns from a reward function on one GPU, in 8 bits if you wish.

The reward asks for answers that use the question's words. Half-precision and quantised weights stay as they
are; adapter and value head are in fp32.

    python examples/bloomz_7b1.py                                   # a GPU with about 20 GB
    python examples/bloomz_7b1.py --quantization 8bit               # a GPU with about 16 GB
    python examples/bloomz_7b1.py --model bigscience/bloomz-560m
    python examples/bloomz_7b1.py --tiny --quantization 8bit        # a toy BLOOM on any CPU: seconds

Afterwards: OUTDIR/best holds the adapter in PEFT's format, OUTDIR/scores.txt the evaluations.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from textrl_swarm import LoraSettings, TextRLActor, TextRLEnv, load_policy, train_agent_with_evaluation
from textrl_swarm.display import accept_any_text
from textrl_swarm.models.tiny import random_bloom

PROMPTS = [
    {"input": "explain how attention works in a seq2seq model"},
    {"input": "explain how a bicycle stays upright"},
]


class OnTopic(TextRLEnv):
    """The share of a response's characters that belong to the prompt's words."""

    def get_reward(self, input_item, predicted_list, finish):
        if not finish:
            return [0.0] * len(predicted_list)
        wanted = set(input_item["input"].split())
        texts = [self.tokenizer.convert_tokens_to_string(tokens) for tokens in predicted_list]
        whole = [
            sum(len(word) for word in text.split() if word in wanted) / max(1, len(text)) for text in texts
        ]
        letters = [
            sum(letter in input_item["input"] for letter in text) / max(1, len(text)) for text in texts
        ]
        return [0.9 * words + 0.1 * single for words, single in zip(whole, letters, strict=True)]


def main() -> None:
    accept_any_text()  # a terminal that is not UTF-8 shows ? for what it cannot
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        default="bigscience/bloomz-7b1-mt",
        help="directory or hub id (default: bigscience/bloomz-7b1-mt)",
    )
    parser.add_argument("--quantization", choices=["8bit", "4bit"], help="of the frozen weights")
    parser.add_argument("--tiny", action="store_true", help="a model made on the spot")
    parser.add_argument(
        "--steps", type=int, default=2000, help="env steps: tokens of each sample (default: 2000)"
    )
    parser.add_argument("--outdir", type=Path, default=Path("runs/example_bloomz"))
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    name = random_bloom(arguments.outdir / "tiny") if arguments.tiny else arguments.model

    with load_policy(name, quantization=arguments.quantization, lora=LoraSettings(r=8)) as policy:
        env = OnTopic(None, policy.tokenizer, observation_input=PROMPTS, max_length=20, compare_sample=8)
        actor = TextRLActor(
            env, policy, policy.tokenizer, act_deterministically=False, temperature=1.0, top_k=50
        )
        agent = actor.agent_ppo(
            update_interval=80, minibatch_size=80, epochs=4, lr=1e-4 if not arguments.tiny else 1e-2
        )
        before = actor.predict(PROMPTS[0])[:2]
        train_agent_with_evaluation(
            agent, env, steps=arguments.steps, outdir=str(arguments.outdir),
            eval_n_steps=None, eval_n_episodes=4, eval_interval=max(1, arguments.steps // 4),
        )  # fmt: skip
        agent.load(str(arguments.outdir / "best"))
        print("before:", before)
        print("after: ", actor.predict(PROMPTS[0])[:2])


if __name__ == "__main__":
    main()
