"""Decoders cut into blocks, in one process: the blocks and what is outside of them compute what the whole
model does, whatever its architecture.

Each family takes a second.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from families import BLOCKS, FAMILIES, HIDDEN, REFUSED, VOCAB, random_checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

from textrl_swarm.decoders.block import DecoderBlock, cache_spec, chunks_are_exact, padding_is_exact
from textrl_swarm.decoders.caches import CacheSpec, keep_rows
from textrl_swarm.decoders.checkpoint import Checkpoint
from textrl_swarm.decoders.chunks import Chunk
from textrl_swarm.decoders.outside import Outside
from textrl_swarm.decoders.planner import Planner
from textrl_swarm.decoders.skeleton import Skeleton
from textrl_swarm.errors import ModelError
from textrl_swarm.models.base_model import resolve

LENGTH = 13
# One of each kind; the others are `slow`.
KINDS = ("bloom", "llama", "gemma3_text", "gpt2", "opt", "cohere", "mixtral", "gpt_oss", "llama4_text")
KINDS += (
    "deepseek_v3",
    "deepseek_v32",
    "glm_moe_dsa",
    "qwen3_next",
    "falcon_h1",
    "lfm2",
    "jamba",
    "gemma4_text",
)
MODELS = [family if family in KINDS else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES]
# Transformers' own chunks forget what came before (in Jamba's and Mamba's layers).
TOKEN_BY_TOKEN = ("jamba", "mamba")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@dataclass
class Parts:
    directory: Path
    planner: Planner
    blocks: list[DecoderBlock]
    specs: list[CacheSpec]
    outside: Outside

    def through(self, hidden: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            hidden = block(hidden)
        return hidden

    def new_caches(self, rows: int, max_length: int) -> list[list[torch.Tensor]]:
        """Filled with noise: what is in them before must not count."""
        return [
            [torch.randn(shape).to(dtype) for shape, dtype in spec.tensors(rows, max_length, torch.float32)]
            for spec in self.specs
        ]

    def step(
        self, tokens: torch.Tensor, chunk: Chunk | int, caches: list[list[torch.Tensor]]
    ) -> torch.Tensor:
        chunk = Chunk(chunk) if isinstance(chunk, int) else chunk
        hidden = self.outside.embed(tokens, chunk.past, chunk.padding)
        for block, spec, tensors in zip(self.blocks, self.specs, caches, strict=True):
            hidden = block.step(hidden, spec, tensors, chunk)
        return self.outside.finish(hidden)


def cut(directory: Path, dtype: torch.dtype = torch.float32, blocks: int = BLOCKS) -> Parts:
    base = resolve(directory)
    planner = Planner(base.config, dtype, "cpu", str(base))
    skeleton = Skeleton(base.config, dtype)
    checkpoint = Checkpoint(base, skeleton)
    # Before the weights are here.
    specs = [cache_spec(skeleton.blocks[i], i, planner) for i in range(blocks)]
    loaded = [DecoderBlock(checkpoint.load_block(i), i, planner) for i in range(blocks)]
    rest = Skeleton(base.config, dtype)
    Checkpoint(base, rest).load_outside()
    return Parts(directory, planner, loaded, specs, Outside(rest))


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Callable[[str], Parts]:
    made: dict[str, Parts] = {}

    def get(family: str) -> Parts:
        if family not in made:
            made[family] = cut(random_checkpoint(family, tmp_path_factory.mktemp("models") / family))
        return made[family]

    return get


def whole(parts: Parts):
    return AutoModelForCausalLM.from_pretrained(parts.directory, dtype=torch.float32).eval()


def tokens(seed: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", MODELS)
def test_logits_and_gradients_are_those_of_the_whole_model(parts, family):
    cut_up, model = parts(family), whole(parts(family))
    ids = tokens()
    entrance = model.get_submodule(cut_up.outside.skeleton.blocks_path)[0]
    given: list[torch.Tensor] = []

    def make_leaf(module, args, kwargs):
        hidden = (args[0] if args else kwargs["hidden_states"]).detach().requires_grad_(True)
        given.append(hidden)
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    hook = entrance.register_forward_pre_hook(make_leaf, with_kwargs=True)
    expected = model(ids, use_cache=False).logits
    hook.remove()
    embedded = cut_up.outside.embed(ids)
    assert torch.equal(embedded, given[0])
    leaf = embedded.detach().requires_grad_(True)
    found = cut_up.outside.logits(cut_up.outside.finish(cut_up.through(leaf)))
    assert torch.equal(found, expected)
    probe = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
    (wanted,) = torch.autograd.grad((expected * probe).sum(), given)
    (gradient,) = torch.autograd.grad((found * probe).sum(), leaf)
    assert (gradient - wanted).abs().max() <= 1e-6 * wanted.abs().max()


@pytest.mark.parametrize("count", [1, 2, 3])
@torch.no_grad()
def test_few_blocks_are_no_other_case(tmp_path, count):
    """With few of them, a decoder that takes tuples runs on tensors, too, and loses a dimension per block."""
    for family, name in (("bloom", "n_layer"), ("llama", "num_hidden_layers"), ("gpt2", "n_layer")):
        directory = random_checkpoint(family, tmp_path / family, **{name: count})
        cut_up = cut(directory, blocks=count)
        found = cut_up.outside.logits(cut_up.outside.finish(cut_up.through(cut_up.outside.embed(tokens()))))
        assert torch.equal(found, whole(cut_up)(tokens(), use_cache=False).logits)


@pytest.mark.parametrize("family", MODELS)
@torch.no_grad()
def test_generation_is_that_of_the_whole_model(parts, family):
    """Greedy, with hidden states compared at every step: equal tokens alone would hide wrong states."""
    cut_up, model = parts(family), whole(parts(family))
    ids = tokens()
    expected = model.generate(
        input_ids=ids,
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    caches = cut_up.new_caches(len(ids), LENGTH + 8)
    hidden = cut_up.step(ids, 0, caches)
    for past, wanted in enumerate(expected.logits, start=LENGTH):
        logits = cut_up.outside.logits(hidden[:, -1])
        torch.testing.assert_close(logits, wanted, rtol=0, atol=2e-5)
        hidden = cut_up.step(logits.argmax(-1, keepdim=True), past, caches)


@pytest.mark.parametrize("family", MODELS)
@torch.no_grad()
def test_a_prompt_may_come_in_chunks(parts, family):
    cut_up = parts(family)
    ids = tokens()
    at_once = cut_up.step(ids, 0, cut_up.new_caches(2, LENGTH))
    caches, chunks, past = cut_up.new_caches(2, LENGTH), [], 0
    lengths = (4, *[1] * 9) if family in TOKEN_BY_TOKEN else (4, 5, 4)
    for chunk in ids.split(lengths, dim=1):
        chunks.append(cut_up.step(chunk, past, caches))
        past += chunk.shape[1]
    torch.testing.assert_close(torch.cat(chunks, dim=1), at_once, rtol=1e-3, atol=1e-3)
    exact = [chunks_are_exact(block, spec) for block, spec in zip(cut_up.blocks, cut_up.specs, strict=True)]
    assert all(exact) == (family not in TOKEN_BY_TOKEN)


@pytest.mark.parametrize("family", MODELS)
def test_the_cache_is_known_before_the_weights(parts, family):
    cut_up = parts(family)
    assert cut_up.specs == [cache_spec(block.module, block.index, cut_up.planner) for block in cut_up.blocks]


def test_a_window_keeps_no_more_than_it_needs(parts):
    shapes = [spec.tensors(2, 100, torch.float32) for spec in parts("gemma3_text").specs]
    assert [shape[0][0] for shape in shapes] == [(2, 2, 3, 16)] * 2 + [(2, 2, 100, 16), (2, 2, 3, 16)]


def test_a_latent_is_all_that_attention_keeps(parts):
    (keys, _), (values, _) = parts("deepseek_v3").specs[0].tensors(2, 100, torch.float32)
    assert (keys, values) == ((2, 1, 100, 8), (2, 1, 100, 4))


def test_states_do_not_grow(parts):
    spec = parts("qwen3_next").specs[0]
    assert spec.key is None
    assert spec.tensors(2, 100, torch.float32) == spec.tensors(2, 1, torch.float32)


@pytest.mark.parametrize("family", ["gemma3_text", "gpt_oss"])
def test_the_arguments_of_another_kind_of_layer_show(parts, family):
    cut_up = parts(family)
    hidden = cut_up.outside.embed(tokens())
    right = cut_up.through(hidden)
    cut_up.blocks[0].index = next(
        i for i, spec in enumerate(cut_up.specs) if spec.window != cut_up.specs[0].window
    )
    try:
        assert (cut_up.through(hidden) - right).abs().max() > 0.01 * right.abs().max()
    finally:
        cut_up.blocks[0].index = 0


@torch.no_grad()
def test_rows_of_a_batch_do_not_mix(parts):
    for family in ("llama", "qwen3_next"):
        cut_up = parts(family)
        ids, caches = tokens(), cut_up.new_caches(2, LENGTH)
        both = torch.cat([cut_up.step(ids[:, :9], 0, caches), cut_up.step(ids[:, 9:], 9, caches)], dim=1)
        alone = cut_up.new_caches(1, LENGTH)
        one = torch.cat([cut_up.step(ids[1:, :9], 0, alone), cut_up.step(ids[1:, 9:], 9, alone)], dim=1)
        torch.testing.assert_close(both[1:], one, rtol=1e-4, atol=1e-5)


def test_bfloat16_is_exact_too(tmp_path):
    for family in ("llama", "deepseek_v3", "gpt_oss"):
        cut_up = cut(random_checkpoint(family, tmp_path / family), torch.bfloat16)
        model = AutoModelForCausalLM.from_pretrained(cut_up.directory, dtype=torch.bfloat16).eval()
        with torch.no_grad():
            found = cut_up.outside.logits(
                cut_up.outside.finish(cut_up.through(cut_up.outside.embed(tokens())))
            )
            assert torch.equal(found, model(tokens(), use_cache=False).logits)


# ------------------------------------------------------------------------------------------- refusals

REASONS = {
    "gemma3n_text": r"block 0 is given \(4, 2, 3, 32\) where one hidden state is \(2, 3, 32\)",
    "gemma4_text": "its decoder reads the embeddings' matrix, which servers do not have",
    "t5": "t5 is an encoder-decoder model; only decoders can be cut into blocks",
    "recurrent_gemma": "keeps what it has seen outside of the cache, where generations would mix",
}


@pytest.mark.parametrize("family", REFUSED)
def test_models_that_cannot_be_cut_are_refused_before_anything_is_loaded(family):
    config = AutoConfig.for_model(family, **REFUSED[family])
    with pytest.raises(ModelError, match=REASONS[family]):
        planner = Planner(config, torch.float32, "cpu", "this model")
        skeleton = Skeleton(config, torch.float32)
        for i, block in enumerate(skeleton.blocks):
            cache_spec(block, i, planner)


def test_a_block_that_needs_another_is_refused(parts, monkeypatch):
    cut_up = parts("llama")
    module = cut_up.blocks[2].module
    monkeypatch.setattr(module, "forward", lambda *args, **kwargs: {}["keys of block 1"])
    with pytest.raises(ModelError, match=r"block 2 .* does not run alone: KeyError.*another block computed"):
        cache_spec(module, 2, cut_up.planner)


# -------------------------------------------------------------------------------------------- loading


def test_only_the_shards_of_a_block_are_read(tmp_path):
    directory = random_checkpoint("llama", tmp_path / "llama")
    base = resolve(directory)
    skeleton = Skeleton(base.config, torch.float32)
    checkpoint = Checkpoint(base, skeleton)
    shards = {file for raw, file in checkpoint._files.items() if ".layers.2." not in raw}
    needed = {file for raw, file in checkpoint._files.items() if ".layers.2." in raw}
    assert needed and shards - needed
    for file in shards - needed:
        (directory / file).unlink()
    block = checkpoint.load_block(2)
    assert not any(parameter.is_meta for parameter in block.parameters())
    assert all(parameter.is_meta for parameter in skeleton.blocks[1].parameters())
    assert skeleton.model.get_input_embeddings().weight.is_meta
    with pytest.raises(ModelError, match=r"model-0000.* of .*llama cannot be read"):
        for i in range(BLOCKS):
            checkpoint.load_block(i)


def test_bin_files_are_read(tmp_path):
    directory = random_checkpoint("mixtral", tmp_path / "mixtral")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    plain = tmp_path / "bin"
    model.config.save_pretrained(plain)
    torch.save(model.state_dict(), plain / "pytorch_model.bin")
    expected = cut(directory)
    found = cut(plain)
    hidden = torch.randn(1, 5, HIDDEN)
    assert torch.equal(found.through(hidden), expected.through(hidden))


def test_a_missing_weight_and_nan_are_named(tmp_path):
    from safetensors.torch import load_file, save_file

    directory = random_checkpoint("llama", tmp_path / "llama")
    base = resolve(directory)
    raw = "model.layers.1.mlp.up_proj.weight"
    file = directory / Checkpoint(base, Skeleton(base.config, torch.float32))._files[raw]
    weights = load_file(file)
    save_file({**weights, raw: weights[raw] * float("nan")}, file, metadata={"format": "pt"})
    checkpoint = Checkpoint(base, Skeleton(base.config, torch.float32))
    with pytest.raises(ModelError, match=f"{raw} in the checkpoint of .*llama' holds NaN"):
        checkpoint.load_block(1)
    checkpoint.load_block(0)
    (index,) = directory.glob("*.index.json")
    whole_index = json.loads(index.read_text())
    del whole_index["weight_map"]["model.layers.0.mlp.up_proj.weight"]
    index.write_text(json.dumps(whole_index))
    with pytest.raises(ModelError, match=r"^1 weights are missing .* e\.g\. model.layers.0.mlp.up_proj"):
        Checkpoint(base, Skeleton(base.config, torch.float32)).load_block(0)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ModelError, match=r"^the weights of .*llama cannot be loaded: "):
        Checkpoint(base, Skeleton(base.config, torch.float32)).load_block(1)


# Transformers' Mamba-1 layers lose the states of rows with padding.
EQUAL_LENGTHS_ONLY = ("mamba",)


@pytest.mark.parametrize("family", MODELS)
def test_rows_of_unequal_length_share_caches(family, parts):
    """Prompts of 3, 5 and 12 tokens, the last for two rows; then a row leaves; then another."""
    cut_up = parts(family)
    for block, spec in zip(cut_up.blocks, cut_up.specs, strict=True):
        assert padding_is_exact(block, spec) == (family not in EQUAL_LENGTHS_ONLY)
    if family in EQUAL_LENGTHS_ONLY:
        return
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randint(3, VOCAB, (length + 5,), generator=generator) for length in (3, 5, 12)]
    prompts = [row[:-5] for row in rows]
    rows.append(torch.cat([prompts[2], torch.randint(3, VOCAB, (5,), generator=generator)]))
    expected = [cut_up.outside.finish(cut_up.through(cut_up.outside.embed(row[None])))[0] for row in rows]
    caches = cut_up.new_caches(4, 17)
    padded = torch.stack([torch.cat([prompts[0].new_full((2,), 3), prompts[0]]), prompts[1]])
    short = cut_up.step(padded, Chunk(0, start=7, width=12, padding=(2, 0)), caches)
    long = cut_up.step(prompts[2][None], Chunk(0, first=2, copies=2), caches)
    torch.testing.assert_close(short[0, 2:], expected[0][:3], rtol=0, atol=1e-3)
    torch.testing.assert_close(short[1], expected[1][:5], rtol=0, atol=1e-3)
    torch.testing.assert_close(long[0], expected[2][:12], rtol=0, atol=1e-3)
    live, padding = [0, 1, 2, 3], [9, 7, 0, 0]
    for step in range(5):
        if step in (2, 4):
            keep = (0, 2, 3) if step == 2 else (1, 2)
            live, padding = [live[i] for i in keep], [padding[i] for i in keep]
            for tensors in caches:
                keep_rows(tensors, keep)
        tokens = torch.stack([rows[i][step - 5] for i in live])[:, None]
        found = cut_up.step(tokens, Chunk(12 + step, padding=tuple(padding)), caches)
        for row, hidden in zip(live, found[:, 0], strict=True):
            torch.testing.assert_close(hidden, expected[row][step - 5], rtol=0, atol=1e-3)
