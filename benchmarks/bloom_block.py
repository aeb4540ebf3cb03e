"""One BLOOM block of a server: ours, which knows no family, beside petals' own, in the same run.

    python benchmarks/bloom_block.py [--hidden 1024] [--rows 8] [--past 1000] [--repeats 7]

Prints a table of medians, and how far the outputs are apart. Contenders take turns within each repeat.
Petals' block is its own forward and backend on today's transformers: masks and alibi anew in every call, a
past that is copied for each token (petals 2.2, server/backend.py; models/bloom/block.py). One thread.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from harness import in_turn, report
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BloomConfig
from transformers.models.bloom.modeling_bloom import BloomBlock, build_alibi_tensor

from textrl_swarm.decoders.chunks import Chunk
from textrl_swarm.models.base_model import resolve
from textrl_swarm.swarm import compat

compat.require_petals()

from petals.utils.convert_block import QuantType  # noqa: E402

from textrl_swarm.swarm.server.served_model import ServedModel  # noqa: E402


class PetalsCache:
    """Keys (B * heads, dim, S) and values (B * heads, S, dim) as petals keeps them, growing by copies."""

    def __init__(self, past: tuple[Tensor, Tensor] | None):
        self.past = past

    def update(self, key: Tensor, value: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        rows, heads, _, dim = key.shape
        if self.past is not None:
            key = torch.cat([self.past[0].view(rows, heads, dim, -1).transpose(2, 3), key], dim=2)
            value = torch.cat([self.past[1].view(rows, heads, -1, dim), value], dim=2)
        self.past = (
            key.transpose(2, 3).reshape(rows * heads, dim, -1),
            value.reshape(rows * heads, -1, dim),
        )
        return key, value


class PetalsBlock:
    """WrappedBloomBlock's forward with TransformerBackend's handling of the cache."""

    def __init__(self, block: BloomBlock, heads: int):
        self.block, self.heads = block, heads

    def __call__(self, hidden: Tensor, cache: PetalsCache | None = None) -> Tensor:
        rows, length = hidden.shape[:2]
        past = 0 if cache is None or cache.past is None else cache.past[1].shape[1]
        alibi = build_alibi_tensor(torch.ones(rows, past + length), self.heads, hidden.dtype)
        hidden_from_query = torch.arange(past + length)[None] > torch.arange(past, past + length)[:, None]
        mask = torch.zeros(1, 1, length, past + length, dtype=hidden.dtype)
        mask.masked_fill_(hidden_from_query, torch.finfo(hidden.dtype).min)
        return self.block(
            hidden, alibi=alibi, attention_mask=mask, layer_past=cache, use_cache=cache is not None
        )[0]

    def step(self, hidden: Tensor, keys: Tensor, values: Tensor, past: int) -> Tensor:
        stop = past + hidden.shape[1]
        cache = PetalsCache((keys[:, :, :past], values[:, :past]))
        output = self(hidden, cache)
        assert cache.past is not None
        keys[:, :, past:stop] = cache.past[0][:, :, past:]
        values[:, past:stop] = cache.past[1][:, past:]
        return output


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--past", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        config = BloomConfig(vocab_size=96, hidden_size=options.hidden, n_layer=2, n_head=16)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
        contenders, difference = make_contenders(Path(directory), config, options)
        rows = []
        for what, pair in contenders.items():
            times = in_turn(pair, options.repeats)
            theirs, ours = times["petals"], times["ours"]
            ratio = f"{theirs.ratio(ours):.2f}"
            rows.append([what, f"{1000 * theirs.median:.1f}", f"{1000 * ours.median:.1f}", ratio])
    title = f"one BLOOM block, hidden {options.hidden}; median ms of {options.repeats}"
    report(title, ["what", "petals'", "ours", "petals' / ours"], rows)
    print(f"largest difference of an output: {difference:.1e}")


def make_contenders(
    directory: Path, config: BloomConfig, options: argparse.Namespace
) -> tuple[dict[str, dict[str, Callable[[], object]]], float]:
    """What is done -> whose block -> an action; and the largest difference of an output."""
    base = resolve(directory)
    model = ServedModel(base, torch.float32, torch.device("cpu"))
    served = model.make_ready(model.load(0), 0, QuantType.NONE)
    petals = PetalsBlock(served.block.module, config.n_head)
    rows, past, dim = options.rows, options.past, config.hidden_size // config.n_head
    token = torch.randn(rows, 1, config.hidden_size)
    prompt = torch.randn(1, 512, config.hidden_size)
    shapes = served.cache_spec.tensors(rows, past + 1, torch.float32)
    ours = [torch.randn(shape) for shape, _ in shapes]
    keys = ours[0].transpose(2, 3).reshape(rows * config.n_head, dim, past + 1).contiguous()
    values = ours[1].reshape(rows * config.n_head, past + 1, dim).clone()
    new = [torch.zeros(shape) for shape, _ in served.cache_spec.tensors(1, 512, torch.float32)]

    def no_grad(action: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return torch.inference_mode()(action)

    def backward(block: Callable[[Tensor], Tensor]) -> Tensor:
        leaf = prompt.clone().requires_grad_()
        (grad,) = torch.autograd.grad(block(leaf).square().mean(), leaf)
        return grad

    def load_as_petals() -> BloomBlock:
        """It reads the whole shard, and keeps what begins with the block's name."""
        state = load_file(directory / "model.safetensors")
        start = "transformer.h.0."
        own = {name.removeprefix(start): one for name, one in state.items() if name.startswith(start)}
        block = BloomBlock(config, 0).eval()
        block.load_state_dict(own)
        return block

    contenders = {
        f"a generation step, {rows} rows behind {past} tokens": {
            "petals": no_grad(lambda: petals.step(token, keys, values, past)),
            "ours": no_grad(lambda: served.block.step(token, served.cache_spec, ours, Chunk(past))),
        },
        "a prompt of 512 tokens, cached": {
            "petals": no_grad(lambda: petals(prompt, PetalsCache(None))),
            "ours": no_grad(lambda: served.block.step(prompt, served.cache_spec, new, Chunk(0))),
        },
        "forward and backward, 512 tokens": {
            "petals": lambda: backward(petals),
            "ours": lambda: backward(served),
        },
        "a block loaded from its file": {"petals": load_as_petals, "ours": lambda: model.load(0)},
    }
    difference = 0.0
    for pair in list(contenders.values())[:3]:
        one, other = (action() for action in pair.values())
        difference = max(difference, float((one - other).abs().max()))
    return contenders, difference


if __name__ == "__main__":
    main()
