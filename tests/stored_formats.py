"""Checkpoints in the formats of published models, written number by number: transformers itself writes them
on GPUs only. It reads them anywhere, and is the oracle of the tests.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FP8_BLOCK = 8
# The numbers that four bits stand for (OCP Microscaling Formats, E2M1), in the order of their codes.
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def store_in_fp8(directory: Path) -> Path:
    """Rewrites the linear layers of a checkpoint's blocks, each square of numbers with a scale."""

    def convert(name: str, tensor: Tensor) -> dict[str, Tensor]:
        if ".layers." not in name or tensor.ndim != 2 or name.endswith("mlp.gate.weight"):
            return {name: tensor}
        rows, columns = (size // FP8_BLOCK for size in tensor.shape)
        squares = tensor.float().view(rows, FP8_BLOCK, columns, FP8_BLOCK)
        scales = squares.abs().amax(dim=(1, 3)) / 448
        numbers = (squares / scales[:, None, :, None]).view(tensor.shape).to(torch.float8_e4m3fn)
        return {name: numbers, f"{name}_scale_inv": scales}

    settings = {"quant_method": "fp8", "weight_block_size": [FP8_BLOCK] * 2, "activation_scheme": "dynamic"}
    return _rewrite(directory, convert, settings)


def store_in_mxfp4(directory: Path) -> Path:
    """Rewrites the experts of a gpt-oss checkpoint, 32 numbers of a row with a power of two."""

    def convert(name: str, tensor: Tensor) -> dict[str, Tensor]:
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            return {name: tensor}
        groups = tensor.float().transpose(1, 2).unflatten(-1, (-1, 32))  # (experts, out, in / 32, 32)
        exponents = (groups.abs().amax(-1) / 6).log2().ceil()
        scaled = groups / exponents.exp2()[..., None]
        codes = (scaled.abs()[..., None] - E2M1).abs().argmin(-1) + 8 * (scaled < 0)
        blocks = (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)
        return {f"{name}_blocks": blocks, f"{name}_scales": (exponents + 127).to(torch.uint8)}

    return _rewrite(directory, convert, {"quant_method": "mxfp4"})


def _rewrite(
    directory: Path, convert: Callable[[str, Tensor], dict[str, Tensor]], settings: dict[str, object]
) -> Path:
    weight_map = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors: dict[str, Tensor] = {}
        for name, tensor in load_file(path).items():
            tensors |= convert(name, tensor)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, path.name)
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return directory
