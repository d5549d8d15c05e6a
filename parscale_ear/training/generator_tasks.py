"""The losses of a VAR's stages: tokenizer, transformer, parallel streams.

Shapes: N pictures, B batch, K scales, L tokens of all scales, P streams, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parscale_ear.data.images import from_uint8, grid, save_png, to_uint8
from parscale_ear.generator.streams import ParallelStreams
from parscale_ear.generator.var import VAR
from parscale_ear.generator.vqvae import VQVAE
from parscale_ear.metrics.reconstruction import mean_quality
from parscale_ear.training.adversary import WithAdversary
from parscale_ear.training.distributed import World
from parscale_ear.training.ear_recipe import EARRecipe
from parscale_ear.training.generator_recipe import VARRecipe
from parscale_ear.training.losses import log_mse_loss
from parscale_ear.training.perceptual import FeatureLoss

VALIDATION_BATCH = 64
PICTURES_SHOWN = 8
IDLE_STEPS = 50  # after which an unused codebook vector is put elsewhere
VQ_WEIGHT = 0.1  # of the quantiser's loss
EACH_WEIGHT = 0.5  # of the streams' own cross-entropies beside that of the joined logits


@dataclass(frozen=True)
class Draw:
    """What chance decides in one step, for this process's share of the step's pictures."""

    numbers: Tensor  # (B,) of the pictures, int64
    mirrored: Tensor  # (B,) whether they are mirrored
    unlabelled: Tensor  # (B,) whether their labels are left out


def draw(
    step: int, count: int, recipe: VARRecipe | EARRecipe, world: World, batch: int | None = None
) -> Draw:
    """Draws for all processes and takes this one's share, so that their number changes nothing.

    Args:
        step: number of the step.
        count: pictures to draw from, without repetition in a step where there are enough.
        recipe: seed and label dropout.
        world: the processes.
        batch: pictures a process; None: the recipe's.
    """
    rng = np.random.default_rng([recipe.seed, step])
    batch = recipe.batch if batch is None else batch
    size = batch * world.size
    share = slice(batch * world.rank, batch * (world.rank + 1))
    numbers = rng.choice(count, size, replace=size > count)
    mirrored, unlabelled = rng.random(size) < 0.5, rng.random(size) < recipe.label_dropout
    return Draw(*(torch.from_numpy(values[share]) for values in (numbers, mirrored, unlabelled)))


class TokenizerTask:
    """Reconstruction, features, and the quantiser's own loss.

    A codebook vector that no picture has asked for in ``IDLE_STEPS`` steps takes the place of one
    that was looked up (Dhariwal et al., "Jukebox", 2020, section 3.1); at the first step so do
    nearly all, so that the codebook starts where the latents are.
    """

    def __init__(
        self,
        model: VQVAE,
        pictures: Tensor,
        validation: Tensor,
        recipe: VARRecipe,
        folder: Path,
        world: World,
    ) -> None:
        """Sets up the stage; ``pictures`` and ``validation`` are (N, 3, side, side), 8-bit."""
        self.model, self.pictures, self.validation = model, pictures, validation
        self.recipe, self.folder, self.world = recipe, folder, world
        self.features = FeatureLoss(world.device) if recipe.feature_weight else None
        # Steps since every codebook vector was last looked up.
        self.idle = torch.full((model.config.vocabulary,), IDLE_STEPS, device=world.device)

    def loss(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a step's batch, and its parts."""
        drawn = draw(step, len(self.pictures), self.recipe, self.world)
        images = from_uint8(self.pictures[drawn.numbers])
        images = torch.where(drawn.mirrored[:, None, None, None], images.flip(-1), images)
        images = images.to(self.world.device, memory_format=torch.channels_last)
        model = self.model
        seen: list[tuple[Tensor, Tensor]] = []
        latent = model.latent(images)
        if bool((self.idle >= IDLE_STEPS).any()):
            with torch.no_grad():
                model.quantizer.encode(latent, lambda *pair: seen.append(pair))
            self._revive(step, torch.cat([vectors for vectors, _ in seen]))
            seen.clear()
        latent, distance = model.quantizer.quantise(latent, lambda *pair: seen.append(pair))
        used = torch.zeros(len(self.idle), device=latent.device)
        used[torch.cat([tokens for _, tokens in seen])] = 1
        self.world.mean_([used])
        self.idle = torch.where(used > 0, 0, self.idle + 1)
        restored = model.decoder(model.post_quantizer(latent))
        reconstruction = log_mse_loss(restored, images)
        loss = reconstruction + VQ_WEIGHT * distance
        parts = {"reconstruction": reconstruction.detach(), "quantiser": distance.detach()}
        if self.features is not None:
            features = self.features(restored, images)
            loss = loss + self.recipe.feature_weight * features
            parts["features"] = features.detach()
        return loss, parts

    @torch.no_grad()
    def _revive(self, step: int, vectors: Tensor) -> None:
        """Puts idle codebook vectors where vectors are looked up; the first process decides."""
        rng = np.random.default_rng([self.recipe.seed, step, len(vectors)])
        idle = (self.idle >= IDLE_STEPS).nonzero().flatten()
        chosen = torch.from_numpy(rng.integers(0, len(vectors), len(idle))).to(vectors.device)
        weight = self.model.quantizer.codebook.weight
        weight[idle] = vectors[chosen]
        self.world.share_([weight])  # all processes take the first one's
        self.idle[idle] = 0

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """How long the codebook's vectors have been idle."""
        return {"idle": self.idle}, {}

    def load_state(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        """Takes up what ``state`` gave."""
        self.idle.copy_(tensors["idle"])

    def elementwise(self) -> list[nn.Parameter]:
        """The codebook."""
        return list(self.model.quantizer.codebook.parameters())

    @torch.no_grad()
    def validate(self, model: nn.Module, step: int) -> dict[str, float]:
        """PSNR, SSIM and the share of the codebook in use; writes some pictures."""
        assert isinstance(model, VQVAE)
        restored, used = [], set()
        for batch in self.validation.split(VALIDATION_BATCH):
            tokens = model.encode(from_uint8(batch).to(self.world.device))
            restored.append(to_uint8(model.decode(tokens)).cpu())
            used |= {int(token) for part in tokens for token in part.unique()}
        found = torch.cat(restored)
        rows = [list(self.validation[:PICTURES_SHOWN]), list(found[:PICTURES_SHOWN])]
        save_png(grid(rows), self.folder / f"validation_{step:07d}.png")
        share = len(used) / model.config.vocabulary
        return {**mean_quality(found, self.validation), "codebook_used": share}


class TokenStore:
    """Tokens of all pictures, as they are and mirrored, and their labels."""

    def __init__(
        self, vqvae: VQVAE, pictures: Tensor, labels: Tensor, device: torch.device
    ) -> None:
        """Encodes (N, 3, side, side) 8-bit pictures with labels (N,)."""
        self.sides, self.labels = vqvae.config.sides, labels
        parts = []
        with torch.no_grad():
            for batch in pictures.split(VALIDATION_BATCH):
                images = from_uint8(batch).to(device)
                both = [torch.cat(vqvae.encode(x), dim=1) for x in (images, images.flip(-1))]
                parts.append(torch.stack(both, dim=1).to(torch.int32).cpu())
        self.tokens = torch.cat(parts)  # (N, 2, L)

    def __len__(self) -> int:
        """N."""
        return len(self.labels)

    def scales(self, numbers: Tensor, mirrored: Tensor, device: torch.device) -> list[Tensor]:
        """Tokens a scale, (B, side²) int64, of some pictures, each mirrored (1) or not (0)."""
        chosen = self.tokens[numbers, mirrored].long().to(device)
        return list(chosen.split([side * side for side in self.sides], dim=1))


def token_losses(
    var: VAR, store: TokenStore, streams: ParallelStreams | None, device: torch.device
) -> Tensor:
    """Cross-entropy of every picture, mean over its tokens, in nats: (N,)."""
    losses = []
    with torch.no_grad():
        for numbers in torch.arange(len(store)).split(VALIDATION_BATCH):
            tokens = store.scales(numbers, torch.zeros_like(numbers), device)
            maps = var.vqvae.quantizer.teacher_input(tokens)
            logits = var.logits_from_maps(store.labels[numbers].to(device), maps, streams)
            targets = torch.cat(tokens, dim=1)  # (B, L)
            found = F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")
            losses.append(found.mean(dim=1).cpu())
    return torch.cat(losses)


class _TokenTask(WithAdversary):
    """What the stages behind the tokenizer share."""

    def __init__(
        self, var: VAR, store: TokenStore, validation: TokenStore, recipe: VARRecipe,
        folder: Path, world: World,
    ) -> None:  # fmt: skip
        self.var, self.store, self.validation = var, store, validation
        self.recipe, self.folder, self.world = recipe, folder, world

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Labels (B,) with some left out, inputs (B, L − T₀, Z) and targets (B, L) of a step."""
        drawn = draw(step, len(self.store), self.recipe, self.world)
        tokens = self.store.scales(drawn.numbers, drawn.mirrored.long(), self.world.device)
        labels = self.store.labels[drawn.numbers].clone()
        labels[drawn.unlabelled] = self.var.transformer.null_label
        with torch.no_grad(), torch.autocast(self.world.device.type, enabled=False):
            maps = self.var.vqvae.quantizer.teacher_input(tokens)
        return labels.to(self.world.device), maps, torch.cat(tokens, dim=1)

    def show(self, var: VAR, step: int, streams: ParallelStreams | None = None) -> None:
        """Writes a grid of drawn pictures, a row a class."""
        generator = torch.Generator(self.world.device).manual_seed(self.recipe.seed)
        rows: list[Sequence[Tensor]] = []
        for label in range(min(var.config.classes, PICTURES_SHOWN)):
            images = var.generate(
                [label] * 4,
                generator=generator,
                streams=streams,
                mode="aggregate" if streams is not None else "diverse",
            )
            rows.append(list(images.float().cpu()))
        save_png(grid(rows), self.folder / f"samples_{step:07d}.png")


class VARTask(_TokenTask):
    """Cross-entropy of all scales' tokens."""

    @property
    def model(self) -> nn.Module:
        """The whole VAR; its tokenizer is frozen."""
        return self.var

    def loss(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean cross-entropy a token, nats."""
        labels, maps, targets = self.batch(step)
        logits = self.var.logits_from_maps(labels, maps)
        return F.cross_entropy(logits.float().transpose(1, 2), targets), {}

    def elementwise(self) -> list[nn.Parameter]:
        """Embeddings and the head."""
        net = self.var.transformer
        tables = (net.class_embedding, net.levels, self.var.head)
        return [net.start, net.positions, *(p for table in tables for p in table.parameters())]

    def validate(self, model: nn.Module, step: int) -> dict[str, float]:
        """Cross-entropy of the validation pictures; writes drawn pictures."""
        assert isinstance(model, VAR)
        self.show(model, step)
        losses = token_losses(model, self.validation, None, self.world.device)
        return {"validation_nats": float(losses.mean())}


class StreamsTask(_TokenTask):
    """Cross-entropy of the joined logits, and of every stream's own, on a frozen backbone."""

    def __init__(
        self, streams: ParallelStreams, var: VAR, store: TokenStore, validation: TokenStore,
        recipe: VARRecipe, folder: Path, world: World,
    ) -> None:  # fmt: skip
        super().__init__(var, store, validation, recipe, folder, world)
        self.streams = streams

    @property
    def model(self) -> nn.Module:
        """The streams alone."""
        return self.streams

    def loss(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Joined cross-entropy and, so that diverse mode draws well, the streams' own mean."""
        labels, maps, targets = self.batch(step)
        logits = self.var.logits_from_maps(labels, maps, self.streams, each=True).float()
        count = logits.shape[1]  # 1 + P
        losses = F.cross_entropy(
            logits.flatten(0, 1).transpose(1, 2),
            targets.repeat_interleave(count, dim=0),
            reduction="none",
        )
        joined, each = losses.unflatten(0, (-1, count)).mean(dim=(0, 2)).split((1, count - 1))
        loss = joined.mean() + EACH_WEIGHT * each.mean()
        return loss, {"joined_nats": joined.mean().detach(), "each_nats": each.mean().detach()}

    def elementwise(self) -> list[nn.Parameter]:
        """The prefixes."""
        return [] if self.streams.prefix is None else [self.streams.prefix]

    def validate(self, model: nn.Module, step: int) -> dict[str, float]:
        """Cross-entropy of the validation pictures; writes drawn pictures."""
        assert isinstance(model, ParallelStreams)
        self.show(self.var, step, model)
        losses = token_losses(self.var, self.validation, model, self.world.device)
        return {"validation_nats": float(losses.mean())}
