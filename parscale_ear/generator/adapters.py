"""The authors' VAR checkpoints under our names.

Source of names and shapes: the published files of FoundationVision/VAR. Keys are translated by
rules, and every key must be accounted for: what is missing, foreign or of another shape is named
in the error.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from parscale_ear.checkpoint import CheckpointError
from parscale_ear.generator.var import VAR, VARConfig
from parscale_ear.generator.vqvae import VQVAEConfig

MOST_NAMED = 5  # keys that an error names of each kind

# Theirs → ours; the first rule that matches the whole key is taken.
_PARTS = {"norm": "norm", "qkv": "qkv", "proj_out": "out"}
_BLOCK = r"(norm1|norm2|conv1|conv2|nin_shortcut)\.(weight|bias)"
_ATTENTION = r"(norm|qkv|proj_out)\.(weight|bias)"
_UNUSED_VQVAE = {"quantize.ema_vocab_hit_SV"}  # statistics of the authors' training
_UNUSED_VAR = {"lvl_1L", "attn_bias_for_masking"}  # buffers that follow from the sides


def _vqvae_name(key: str, levels: int) -> str | None:
    """Our name of one of the tokenizer's keys; None for a foreign one."""

    def block(name: str) -> str:
        return "shortcut" if name == "nin_shortcut" else name

    def level(side: str, index: str) -> int:
        # The decoder's levels are numbered by resolution there, by order here.
        return int(index) if side == "down" else levels - 1 - int(index)

    place = r"(encoder|decoder)\.(down|up)\.(\d+)\."
    if m := re.fullmatch(place + r"block\.(\d+)\." + _BLOCK, key):
        return f"{m[1]}.levels.{level(m[2], m[3])}.blocks.{m[4]}.{block(m[5])}.{m[6]}"
    if m := re.fullmatch(place + r"attn\.(\d+)\." + _ATTENTION, key):
        return f"{m[1]}.levels.{level(m[2], m[3])}.attention.{m[4]}.{_PARTS[m[5]]}.{m[6]}"
    if m := re.fullmatch(place + r"(?:downsample|upsample)\.conv\.(weight|bias)", key):
        return f"{m[1]}.{m[2]}s.{level(m[2], m[3])}.{m[4]}"
    if m := re.fullmatch(r"(encoder|decoder)\.mid\.block_([12])\." + _BLOCK, key):
        return f"{m[1]}.middle.block{m[2]}.{block(m[3])}.{m[4]}"
    if m := re.fullmatch(r"(encoder|decoder)\.mid\.attn_1\." + _ATTENTION, key):
        return f"{m[1]}.middle.attention.{_PARTS[m[2]]}.{m[3]}"
    if re.fullmatch(r"(encoder|decoder)\.(conv_in|norm_out|conv_out)\.(weight|bias)", key):
        return key
    if m := re.fullmatch(r"(quant_conv|post_quant_conv)\.(weight|bias)", key):
        return ("pre_quantizer" if m[1] == "quant_conv" else "post_quantizer") + f".{m[2]}"
    if m := re.fullmatch(r"quantize\.quant_resi\.qresi_ls\.(\d+)\.(weight|bias)", key):
        return f"quantizer.phi.{m[1]}.{m[2]}"
    return "quantizer.codebook.weight" if key == "quantize.embedding.weight" else None


_VAR_NAMES = {
    "pos_start": "transformer.start",
    "pos_1LC": "transformer.positions",
    "class_emb.weight": "transformer.class_embedding.weight",
    "lvl_embed.weight": "transformer.levels.weight",
    "word_embed.weight": "transformer.input.weight",
    "word_embed.bias": "transformer.input.bias",
    "shared_ada_lin.1.weight": "transformer.shared_modulation.weight",
    "shared_ada_lin.1.bias": "transformer.shared_modulation.bias",
    "head_nm.ada_lin.1.weight": "transformer.output_modulation.weight",
    "head_nm.ada_lin.1.bias": "transformer.output_modulation.bias",
    "head.weight": "head.weight",
    "head.bias": "head.bias",
}
_BLOCK_NAMES = {
    "attn.scale_mul_1H11": "attention.log_scale",
    "attn.q_bias": "attention.query_bias",
    "attn.v_bias": "attention.value_bias",
    "attn.mat_qkv.weight": "attention.qkv.weight",
    "attn.proj.weight": "attention.out.weight",
    "attn.proj.bias": "attention.out.bias",
    "ffn.fc1.weight": "mlp_in.weight",
    "ffn.fc1.bias": "mlp_in.bias",
    "ffn.fc2.weight": "mlp_out.weight",
    "ffn.fc2.bias": "mlp_out.bias",
    "ada_lin.1.weight": "modulation.weight",
    "ada_lin.1.bias": "modulation.bias",
    "ada_gss": "modulation_offset",
}
_FLATTENED = ("start", "positions", "log_scale", "modulation_offset")  # have extra ones of size 1


def _var_name(key: str) -> str | None:
    """Our name of one of the transformer's keys; None for a foreign one."""
    if m := re.fullmatch(r"blocks\.(\d+)\.(.+)", key):
        name = _BLOCK_NAMES.get(m[2])
        return None if name is None else f"transformer.blocks.{m[1]}.{name}"
    return _VAR_NAMES.get(key)


def load_official(
    model_class: type[VAR],
    vqvae_path: str | os.PathLike[str],
    var_path: str | os.PathLike[str],
    *,
    heads: int | None = None,
    depth: int | None = None,
) -> VAR:
    """As :meth:`VAR.from_official`, on the CPU in FP32."""
    vqvae_path, var_path = Path(vqvae_path), Path(var_path)
    tokenizer, transformer = read_state_dict(vqvae_path), read_state_dict(var_path)
    sides = _sides(transformer, var_path)
    vqvae_config = _vqvae_config(tokenizer, sides, vqvae_path)
    config = _var_config(transformer, vqvae_config, heads, var_path)
    if depth is not None and config.depth != depth:
        raise CheckpointError(f"{var_path}: has depth {config.depth}, expected {depth}")
    with torch.device("meta"):
        model = model_class(config)
    levels = len(vqvae_config.multipliers)
    ours: dict[str, Tensor] = {}
    expected = model.state_dict()
    _translate(
        tokenizer,
        {k: None if (n := _vqvae_name(k, levels)) is None else f"vqvae.{n}" for k in tokenizer},
        _UNUSED_VQVAE,
        {k: v for k, v in expected.items() if k.startswith("vqvae.")},
        ours,
        vqvae_path,
    )
    zeros = {f"blocks.{k}.attn.zero_k_bias" for k in range(config.depth)}
    for key in sorted(zeros & set(transformer)):
        if bool(transformer[key].any()):
            raise CheckpointError(f"{var_path}: {key} is not zero; keys have no bias in VAR")
    _translate(
        transformer,
        {k: _var_name(k) for k in transformer},
        _UNUSED_VAR | zeros,
        {k: v for k, v in expected.items() if not k.startswith("vqvae.")},
        ours,
        var_path,
    )
    model.load_state_dict(ours, assign=True)
    model.vqvae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.pth`` file, without running code from it.

    Raises:
        CheckpointError: the file is missing or damaged, or holds anything but named tensors.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # damaged bytes make PyTorch's reader throw errors of many kinds
        raise CheckpointError(
            f"{path}: not a checkpoint of tensors alone, as the authors' files are "
            f"({type(error).__name__}); download it again, or name files of ours by --checkpoint"
        ) from error
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise CheckpointError(f"{path}: not a state dict; expected named tensors alone")
    return found


def _translate(
    theirs: Mapping[str, Tensor],
    names: Mapping[str, str | None],
    unused: set[str],
    expected: Mapping[str, Tensor],
    ours: dict[str, Tensor],
    path: Path,
) -> None:
    """Puts their tensors into ``ours`` under our names; every key must be accounted for."""
    foreign = sorted(k for k in theirs if k not in unused and names[k] not in expected)
    back = {name: key for key, name in names.items() if name is not None}
    missing = sorted(name for name in expected if name not in back)
    problems = []
    if foreign:
        problems.append(f"foreign keys: {_some(foreign)}")
    if missing:
        problems.append(f"missing keys, by our names: {_some(missing)}")
    for name in sorted(set(expected) & set(back)):
        tensor, shape = theirs[back[name]], tuple(expected[name].shape)
        if name.endswith(_FLATTENED) and tensor.numel() == expected[name].numel():
            tensor = tensor.reshape(shape)
        if tuple(tensor.shape) != shape:
            problems.append(f"{back[name]} is {tuple(tensor.shape)} instead of {shape}")
        ours[name] = tensor.float().contiguous()
    if problems:
        raise CheckpointError(f"{path}: {'; '.join(problems[:MOST_NAMED])}")


def _some(keys: list[str]) -> str:
    more = len(keys) - MOST_NAMED
    return ", ".join(keys[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def _tensor(state: Mapping[str, Tensor], key: str, path: Path, ndim: int) -> Tensor:
    tensor = state.get(key)
    if tensor is None or tensor.ndim != ndim:
        raise CheckpointError(f"{path}: lacks {key}, so it is not one of VAR's checkpoints")
    return tensor


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """One more than the largest number that the pattern finds in the keys."""
    found = [int(m[1]) for key in state if (m := re.match(pattern, key))]
    return max(found, default=-1) + 1


def _sides(state: Mapping[str, Tensor], path: Path) -> tuple[int, ...]:
    levels = _tensor(state, "lvl_1L", path, 2)
    sides = [round(float(n) ** 0.5) for n in levels[0].long().bincount()]
    if [s * s for s in sides] != levels[0].long().bincount().tolist():
        raise CheckpointError(f"{path}: lvl_1L does not tell the sides of square token maps")
    return tuple(sides)


def _vqvae_config(state: Mapping[str, Tensor], sides: tuple[int, ...], path: Path) -> VQVAEConfig:
    codebook = _tensor(state, "quantize.embedding.weight", path, 2)
    width = _tensor(state, "encoder.conv_in.weight", path, 4).shape[0]
    multipliers = [
        _tensor(state, f"encoder.down.{k}.block.0.conv1.weight", path, 4).shape[0] // width
        for k in range(_count(state, r"encoder\.down\.(\d+)\."))
    ]
    try:
        return VQVAEConfig(
            vocabulary=codebook.shape[0],
            latent_channels=codebook.shape[1],
            width=width,
            multipliers=tuple(multipliers),
            blocks=_count(state, r"encoder\.down\.0\.block\.(\d+)\."),
            sides=sides,
            phis=_count(state, r"quantize\.quant_resi\.qresi_ls\.(\d+)\."),
        )
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _var_config(
    state: Mapping[str, Tensor], vqvae: VQVAEConfig, heads: int | None, path: Path
) -> VARConfig:
    classes = _tensor(state, "class_emb.weight", path, 2)
    scales = state.get("blocks.0.attn.scale_mul_1H11")
    if scales is not None:
        heads = scales.numel()
    try:
        return VARConfig(
            depth=_count(state, r"blocks\.(\d+)\."),
            width=classes.shape[1],
            heads=heads,
            classes=classes.shape[0] - 1,
            l2_norm=scales is not None,
            shared_modulation="shared_ada_lin.1.weight" in state,
            vqvae=vqvae,
        )
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
