#!/usr/bin/env python
"""TextRL's fourth example: a sentiment classifier steers a language model, which stays fluent.

The reward is the classifier's probability of the wanted label for prompt and response together. Fluency comes
from the KL penalty: every nat by which a token is less likely under the original model costs `--kl-coef`, so
that shouting one good word does not pay.

    python examples/controllable_generation.py                      # gpt2, towards distilbert-imdb's POSITIVE
    python examples/controllable_generation.py --label NEGATIVE     # speaks ill of things
    python examples/controllable_generation.py --model M --classifier C --label L --prompts prompts.txt
    python examples/controllable_generation.py --tiny               # about two minutes

--tiny trains both on the spot: a BLOOM that speaks of soup and phones, and a classifier of such sentences.
Ends with the same prompts before and after. Afterwards: OUTDIR/best holds the adapter in PEFT's format.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import pipeline

from textrl_swarm import (
    SamplingConfig,
    TextRLActor,
    TextRLEnv,
    load_policy,
    load_prompts,
    reward_model,
    train_agent_with_evaluation,
)
from textrl_swarm.display import accept_any_text
from textrl_swarm.models.corpus import DEMO_PROMPTS, build_corpus, opinion
from textrl_swarm.models.tiny import make_tiny_bloom

console = Console()


def make_tiny(directory: Path) -> tuple[Path, Path]:
    """A tiny BLOOM that has read short opinions, and a classifier of them.

    Takes half a minute to a minute, once per directory.
    """
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    console.print("pretraining a tiny BLOOM (up to 90 s the first time) ...")
    model = make_tiny_bloom(directory / "model")
    classifier = directory / "classifier"
    if not (classifier / "config.json").is_file():
        console.print("training a tiny classifier ...")
        tokenizer = AutoTokenizer.from_pretrained(model)
        labels = {0: "NEGATIVE", 1: "POSITIVE"}
        torch.manual_seed(0)
        net = BertForSequenceClassification(
            BertConfig(
                vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id,
                hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
                num_labels=2, id2label=labels, label2id={name: i for i, name in labels.items()},
            )
        )  # fmt: skip
        texts = build_corpus(0)
        optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
        for rows in torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).split(32)[:150]:
            batch = [texts[i] for i in rows.tolist()]
            inputs = tokenizer(batch, return_tensors="pt", padding=True, return_token_type_ids=False)
            loss = net(**inputs, labels=torch.tensor([int(opinion(text) > 0.5) for text in batch])).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        net.eval().save_pretrained(classifier)
        tokenizer.save_pretrained(classifier)
    return model, classifier


class Sentiment(TextRLEnv):
    """What a classifier says about prompt and response, at the end."""

    reward_on_finish_only = True

    def __init__(self, classifier, *arguments, **options):
        super().__init__(*arguments, **options)
        self.classifier = classifier

    def get_reward(self, input_item, predicted_list, finish):
        texts = [
            self.tokenizer.decode(self.tokenizer.convert_tokens_to_ids(tokens), skip_special_tokens=True)
            for tokens in predicted_list
        ]
        return self.classifier.score([input_item["input"] + text for text in texts])


def main() -> None:
    accept_any_text()  # a terminal that is not UTF-8 shows ? for what it cannot
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="gpt2", help="directory or hub id (default: gpt2)")
    parser.add_argument(
        "--classifier",
        default="lvwerra/distilbert-imdb",
        help="directory or hub id (default: lvwerra/distilbert-imdb)",
    )
    parser.add_argument(
        "--label", default="POSITIVE", help="whose probability is the reward (default: POSITIVE)"
    )
    parser.add_argument(
        "--prompts", default=None, help="a file, one prompt per line (default: short beginnings of opinions)"
    )
    parser.add_argument(
        "--kl-coef",
        type=float,
        default=0.05,
        help="price of a nat away from the original model (default: 0.05)",
    )
    parser.add_argument("--tiny", action="store_true", help="a model and a classifier made on the spot")
    parser.add_argument(
        "--steps", type=int, default=6000, help="env steps: tokens of each sample (default: 6000)"
    )
    parser.add_argument("--outdir", type=Path, default=Path("runs/example_sentiment"))
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1 if arguments.tiny else torch.get_num_threads())
    name, judge = (
        make_tiny(arguments.outdir / "tiny") if arguments.tiny else (arguments.model, arguments.classifier)
    )
    prompts = load_prompts(arguments.prompts or list(DEMO_PROMPTS))

    classifier = reward_model(pipeline("text-classification", model=str(judge)), label=arguments.label)
    with load_policy(name) as policy:
        env = Sentiment(
            classifier, None, policy.tokenizer, observation_input=prompts, max_length=24, compare_sample=4
        )
        actor = TextRLActor(env, policy, policy.tokenizer, act_deterministically=False)
        agent = actor.agent_ppo(
            update_interval=16 * 24,
            minibatch_size=16 * 24,
            epochs=4,
            kl_coef=arguments.kl_coef,
            lr=1e-4 if not arguments.tiny else 3e-3,
        )

        def listen() -> tuple[tuple[str, ...], list[float]]:
            """One response to each prompt, always from the same random numbers, and its score."""
            texts = policy.generate(
                [item["input"] for item in prompts], SamplingConfig(max_new_tokens=24, seed=1)
            ).texts
            return texts, classifier(prompts, texts)

        before, scores_before = listen()
        train_agent_with_evaluation(
            agent, env, steps=arguments.steps, outdir=str(arguments.outdir),
            eval_n_steps=None, eval_n_episodes=8, eval_interval=max(1, arguments.steps // 4),
        )  # fmt: skip
        agent.load(str(arguments.outdir / "best"))
        after, scores_after = listen()

    table = Table(title=f"probability of {arguments.label}, the same random numbers", title_justify="left")
    for heading in ("prompt", "before", "", "after", ""):
        table.add_column(heading, overflow="fold")
    rows = list(zip(prompts, before, scores_before, after, scores_after, strict=True))
    for item, old, a, new, b in rows[:10]:
        table.add_row(escape(item["input"]), escape(old.strip()), f"{a:.2f}", escape(new.strip()), f"{b:.2f}")
    console.print(table)
    means = [sum(scores) / len(scores) for scores in (scores_before, scores_after)]
    console.print(
        f"mean score before {means[0]:.2f}, after {means[1]:.2f}; "
        f"the adapter is in {arguments.outdir / 'best'}",
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
