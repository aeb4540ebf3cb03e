"""Loads what was exported with plain transformers + peft, in a process that knows nothing of textrl_swarm.

    python plain_check.py REQUEST.json

The request: {"model": directory or hub id, "adapter": directory or null, "tokens": [[ids], ...],
"max_new_tokens": n}. Prints a JSON list: for each row of tokens the logits after its last token, and the
greedy continuation's token ids. check.py runs a copy of this file, away from its neighbours.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(request["model"], trust_remote_code=False)
    if request["adapter"] is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, request["adapter"])
    for layer in model.modules():  # bitsandbytes would repack 4-bit weights, and round their scales
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    model.eval()
    answers = []
    for row in request["tokens"]:
        inputs = {
            "input_ids": torch.tensor([row], device=model.device),
            "attention_mask": torch.ones(1, len(row), dtype=torch.int64, device=model.device),
        }
        with torch.no_grad():
            logits = model(**inputs).logits[0, -1].float()
            tokens = model.generate(**inputs, max_new_tokens=request["max_new_tokens"], do_sample=False)[
                0, len(row) :
            ]
        answers.append({"tokens": tokens.tolist(), "logits": logits.tolist()})
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
