"""A plain VAR generation on the same weights, written for clarity alone: the twin.

FP32 weights (under autocast where the caller wants BF16), keys and values joined by
``torch.cat``, the class's modulations computed anew at every scale, logits for all rows. What the
package does faster must give the same logits as this.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from parscale_ear.generator.attention import MAX_LOG_SCALE
from parscale_ear.generator.sampling import sample_tokens
from parscale_ear.generator.var import VAR


@torch.no_grad()
def eager_tokens(
    var: VAR,
    labels: list[int],
    *,
    guidance: float = 1.5,
    top_k: int = 900,
    top_p: float = 0.95,
    generator: torch.Generator | None = None,
    on_logits: Callable[[int, Tensor], object] | None = None,
    on_scale: Callable[[int], object] | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Tokens of all scales and the latent that they add up to."""
    net, quantizer = var.transformer, var.vqvae.quantizer
    config, sides = net.config, quantizer.sides
    null = (
        [net.null_label] * len(labels) if guidance else []
    )  # rows that nothing is asked of cost time
    device = net.positions.device
    classes = net.class_embedding(torch.tensor([*labels, *null], device=device))  # (B or 2B, C)
    batch, rows, heads = len(labels), len(labels) + len(null), config.heads
    keys: list[Tensor | None] = [None] * config.depth
    values: list[Tensor | None] = [None] * config.depth
    latent = torch.zeros(batch, quantizer.channels, sides[-1], sides[-1], device=device)
    maps = classes[:, None] + net.start  # (B or 2B, T, C)
    start, tokens = 0, []
    for scale, side in enumerate(sides):
        count = side * side
        x = maps + net.levels.weight[scale] + net.positions[start : start + count]
        start += count
        for layer, block in enumerate(net.blocks):
            if config.shared_modulation:
                six = net.shared_modulation(F.silu(classes)).view(-1, 1, 6, config.width)
                six = six + block.modulation_offset
            else:
                six = block.modulation(F.silu(classes)).view(-1, 1, 6, config.width)
            gain1, gain2, scale1, scale2, shift1, shift2 = six.unbind(2)
            normed = F.layer_norm(x, (config.width,), eps=1e-6) * (1 + scale1) + shift1
            attention = block.attention
            bias = attention.query_bias
            bias = torch.cat((bias, torch.zeros_like(bias), attention.value_bias))
            qkv = F.linear(normed, attention.qkv.weight, bias)
            query, key, value = (
                part.view(rows, count, heads, -1).transpose(1, 2) for part in qkv.chunk(3, -1)
            )
            softmax_scale = 0.25 / query.shape[-1] ** 0.5
            if attention.log_scale is not None:
                gain = attention.log_scale.clamp_max(MAX_LOG_SCALE).exp().view(1, -1, 1, 1)
                query, key = F.normalize(query, dim=-1) * gain, F.normalize(key, dim=-1)
                query, key, softmax_scale = query.to(value), key.to(value), 1.0
            if keys[layer] is not None:
                key = torch.cat((keys[layer], key), dim=2)
                value = torch.cat((values[layer], value), dim=2)
            keys[layer], values[layer] = key, value
            mixed = F.scaled_dot_product_attention(query, key, value, scale=softmax_scale)
            mixed = mixed.transpose(1, 2).reshape(rows, count, -1)
            x = x + attention.out(mixed) * gain1
            normed = F.layer_norm(x, (config.width,), eps=1e-6) * (1 + scale2) + shift2
            x = x + block.mlp_out(F.gelu(block.mlp_in(normed), approximate="tanh")) * gain2
        scale_out, shift_out = (
            net.output_modulation(F.silu(classes)).view(-1, 1, 2, config.width).unbind(2)
        )
        normed = F.layer_norm(x, (config.width,), eps=1e-6) * (1 + scale_out) + shift_out
        logits = var.head(normed).float()
        weight = guidance * scale / max(1, len(sides) - 1)
        if null:
            logits = (1 + weight) * logits[:batch] - weight * logits[batch:]
        if on_logits is not None:
            on_logits(scale, logits)
        drawn = sample_tokens(logits, top_k=top_k, top_p=top_p, generator=generator)
        tokens.append(drawn)
        latent = latent + quantizer.contribution(scale, drawn)
        if on_scale is not None:
            on_scale(scale)
        if scale + 1 < len(sides):
            maps = net.input(quantizer.resized(scale + 1, latent)).repeat(rows // batch, 1, 1)
    return tokens, latent
