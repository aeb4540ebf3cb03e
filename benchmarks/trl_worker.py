"""A trainer of TRL's for local_speed.py, in TRL's own environment: one iteration per line of standard input.

python trl_worker.py OBJECTIVE MODEL PROMPT RESPONSES NEW_TOKENS SAMPLES THREADS EPOCHS
"""

from __future__ import annotations

import sys
import tempfile
from typing import Any

import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback


def main() -> None:
    objective, model, prompt, *numbers = sys.argv[1:]
    responses, new_tokens, samples, threads, epochs = map(int, numbers)

    class Wait(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % epochs == 0:
                if state.global_step:
                    print("done", flush=True)
                sys.stdin.readline()

    def rewarded(completions: list[str], **_: Any) -> list[float]:
        return [text.count("e") / max(1, len(text)) for text in completions]

    torch.set_num_threads(threads)
    config = getattr(trl, f"{objective}Config")(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=responses, num_generations=samples,
        max_completion_length=new_tokens, num_iterations=epochs, beta=0.05, learning_rate=1e-4, use_cpu=True,
        max_steps=10_000, save_strategy="no", report_to="none", disable_tqdm=True, logging_steps=10_000,
        temperature=1.0, top_k=0, gradient_checkpointing=False, bf16=False,
        generation_kwargs={"eos_token_id": None},
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    trainer = getattr(trl, f"{objective}Trainer")(
        model=AutoModelForCausalLM.from_pretrained(model), args=config, reward_funcs=rewarded,
        processing_class=tokenizer, train_dataset=Dataset.from_dict({"prompt": [prompt] * 64}),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"), callbacks=[Wait()],
    )  # fmt: skip
    trainer.train()


if __name__ == "__main__":
    main()
