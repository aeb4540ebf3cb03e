"""Loads a trained adapter with plain transformers + peft, in a process that knows nothing of textrl_swarm.

    python plain_check.py BASE_MODEL ADAPTER PROMPTS.json

Reads a list of prompts, prints a JSON list: for each prompt the greedy continuation's token ids and the logits after the prompt.
"""

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar


def main() -> None:
    base, adapter, prompts = sys.argv[1:]
    torch.set_num_threads(1)
    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    answers = []
    for prompt in json.loads(Path(prompts).read_text(encoding="utf-8")):
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        with torch.no_grad():
            logits = model(**inputs).logits[0, -1]
            tokens = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        answers.append({"tokens": tokens.tolist(), "logits": logits.tolist()})
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
