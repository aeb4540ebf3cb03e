"""TextRL's own loop for local_speed.py, in its own environment: one iteration per line of standard input.

python textrl_worker.py MODEL PROMPT RESPONSES NEW_TOKENS SAMPLES THREADS EPOCHS
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from textrl import TextRLActor, TextRLEnv
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast


class Env(TextRLEnv):
    def get_reward(self, input_item: Any, predicted_list: list[list[str]], finish: bool) -> list[float]:
        if not finish:
            return [0.0] * len(predicted_list)
        texts = ["".join(tokens) for tokens in predicted_list]
        return [text.count("e") / max(1, len(text)) for text in texts]


def main() -> None:
    model_path, prompt, *numbers = sys.argv[1:]
    responses, new_tokens, samples, threads, epochs = map(int, numbers)
    torch.set_num_threads(threads)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=f"{model_path}/tokenizer.json",
        eos_token="</s>",
        model_input_names=["input_ids", "attention_mask"],
    )
    model = AutoModelForCausalLM.from_pretrained(model_path)
    env = Env(
        model, tokenizer, observation_input=[{"input": prompt}], max_length=new_tokens, compare_sample=samples
    )
    actor = TextRLActor(env, model, tokenizer, act_deterministically=False)
    torch.nn.Module.cuda = lambda self, device=None: self  # it knows no machines without CUDA
    actor.gpu_id = -1
    actor.device = torch.device("cpu")
    steps = responses // samples * new_tokens
    agent = actor.agent_ppo(update_interval=steps, minibatch_size=steps, epochs=epochs)
    agent.training = True
    for _ in sys.stdin:
        taken = 0
        while taken < steps:
            observation, done, length = env.reset(), False, 0
            while not done and length < new_tokens:
                action = agent.act(observation)
                observation, reward, done, _ = env.step(action)
                length += 1
                agent.observe(observation, reward, done, length == new_tokens)
            taken += length
        print("done", flush=True)


if __name__ == "__main__":
    main()
