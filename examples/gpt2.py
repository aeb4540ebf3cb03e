#!/usr/bin/env python
"""TextRL's first example: GPT-2 learns from a reward function, on this machine.

The reward asks for short words. The environment, the actor and the training function are TextRL's; what is
trained is a LoRA adapter.

    python examples/gpt2.py                                   # gpt2 of the hub, on a GPU if there is one
    python examples/gpt2.py --model ./my-gpt2 --steps 4000    # any decoder-only model
    python examples/gpt2.py --tiny                            # three small blocks, made on the spot: seconds

Afterwards: OUTDIR/best holds the adapter in PEFT's format, OUTDIR/scores.txt the evaluations.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from textrl_swarm import TextRLActor, TextRLEnv, train_agent_with_evaluation
from textrl_swarm.display import accept_any_text

PROMPTS = [{"input": "The best thing about a garden is"}, {"input": "When I was a child, I"}]


class ShortWords(TextRLEnv):
    """One minus a tenth of the mean length of a response's words."""

    def get_reward(self, input_item, predicted_list, finish):
        if not finish:
            return [0.0] * len(predicted_list)
        texts = [self.tokenizer.convert_tokens_to_string(tokens) for tokens in predicted_list]
        return [1 - 0.1 * len(text) / max(1, len(text.split())) for text in texts]


def make_tiny(directory: Path) -> str:
    """A random GPT-2 with a tokenizer of single characters."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from textrl_swarm.models.tiny import random_bloom

    tokenizer = AutoTokenizer.from_pretrained(random_bloom(directory / "tokenizer"))
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=32,
        n_layer=3,
        n_head=4,
        n_positions=128,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    GPT2LMHeadModel(config).save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    return str(directory / "model")


def main() -> None:
    accept_any_text()  # a terminal that is not UTF-8 shows ? for what it cannot
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="gpt2", help="directory or hub id (default: gpt2)")
    parser.add_argument("--tiny", action="store_true", help="a model made on the spot")
    parser.add_argument(
        "--steps", type=int, default=2000, help="env steps: tokens of each sample (default: 2000)"
    )
    parser.add_argument("--outdir", type=Path, default=Path("runs/example_gpt2"))
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    name = make_tiny(arguments.outdir / "tiny") if arguments.tiny else arguments.model

    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype="auto", device_map="auto")
    env = ShortWords(model, tokenizer, observation_input=PROMPTS, max_length=20, compare_sample=8)
    actor = TextRLActor(env, model, tokenizer, act_deterministically=False, temperature=1.0)
    agent = actor.agent_ppo(
        update_interval=80, minibatch_size=80, epochs=4, lr=3e-4 if not arguments.tiny else 1e-2
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
