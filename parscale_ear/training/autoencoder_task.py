"""The losses of the autoencoder's stages, and the batches that they are taken on.

Shapes: B batch, Z latent channels, h w latent height and width.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn

from parscale_ear.autoencoder.model import ParScaleEAR
from parscale_ear.autoencoder.reconstruct import reconstruct_pictures
from parscale_ear.data.crops import RandomCrops
from parscale_ear.data.images import grid, save_png
from parscale_ear.metrics.reconstruction import mean_quality
from parscale_ear.training.adversary import Adversary, WithAdversary
from parscale_ear.training.distributed import World
from parscale_ear.training.loop import autocast_dtype, derived_seed
from parscale_ear.training.losses import chroma_loss, log_mse_loss, pattern_loss, ssim_loss
from parscale_ear.training.perceptual import Critic, FeatureLoss
from parscale_ear.training.recipe import FROZEN_ENCODER, Recipe

STATISTICS_DECAY = 0.99  # of the latent's running mean and variance, a step
PICTURES_SHOWN = 6
CRITIC_WARMUP = 200  # steps before the critic's verdict counts in full


class AutoencoderTask(WithAdversary):
    """Reconstruction loss and KL of one stage."""

    def __init__(
        self,
        stage: str,
        model: ParScaleEAR,
        crops: RandomCrops,
        recipe: Recipe,
        validation: Tensor,
        folder: Path,
        world: World,
    ) -> None:
        """Sets up one stage; ``validation`` is (N, 3, 256, 256), 8-bit."""
        self.stage, self.model, self.recipe = stage, model, recipe
        # As the pictures are: BF16 kernels of CPUs would reorder others at every call.
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.validation, self.folder, self.world = validation, folder, world
        self.frozen = stage in FROZEN_ENCODER
        side, self.batch = recipe.crops(stage)
        assert crops.side == side
        self.crops = CropsAhead(crops, self.batch, self.batch * world.rank, recipe.workers)
        if stage == "sharp":
            self.features = FeatureLoss(world.device)
            critic = Critic().to(world.device)
            self.adversary = Adversary(
                critic, recipe.final_rate, world, betas=(0.5, 0.95), warmup_steps=CRITIC_WARMUP
            )

    def loss(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a step's batch, and its parts."""
        images = self.crops.batch(step)
        images = images.to(self.world.device, memory_format=torch.channels_last)
        if self.stage == "sharp":
            return self._sharp_loss(step, images)
        if self.frozen:
            with torch.no_grad():
                latent = self._noisy(step, self.model.encode(images).mode())
            return self._reconstruction_loss(self._decoded(latent), images)
        first = posterior = self.model.encode(images)
        noise = (0.5 * first.log_variance).exp() * self._noise(step, 0, first.mean)
        restored = self._decoded(self._noisy(step, first.mean + noise))
        loss, parts = self._reconstruction_loss(restored, images)
        for number in range(1, self.recipe.refinements + 1):
            # As this corrects what the noise did, too, little of it is left in what is decoded here.
            posterior = self.model.refined(first, posterior, restored)
            restored = self._decoded(posterior.mean + noise)
            more, found = self._reconstruction_loss(restored, images)
            loss = loss + more
            parts |= {f"{name}_{number}": value for name, value in found.items()}
        self._update_statistics(first.mean)  # for the next step: within one all use the same
        kl = first.kl().mean()
        loss = loss / (1 + self.recipe.refinements) + self.recipe.kl_weight * kl
        return loss, {**parts, "kl_nats": kl.detach()}

    def _decoded(self, latent: Tensor) -> Tensor:
        return self.model.decode(self.model.enhance(latent))

    def _reconstruction_loss(
        self, restored: Tensor, images: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Of pixels and, with a weight, of structure."""
        loss = reconstruction = log_mse_loss(restored, images)
        parts = {"reconstruction": reconstruction.detach()}
        if self.recipe.ssim_weight:
            # Half of them, as it is slow: of even batches the same half for any number of processes.
            structure = ssim_loss(restored[::2], images[::2])
            loss = loss + self.recipe.ssim_weight * structure
            parts["ssim"] = 1 - structure.detach()
        return loss, parts

    def _sharp_loss(self, step: int, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Pixels, features, the critic's verdict, what all cells have in common, and colour."""
        with torch.no_grad():
            latent = self.model.enhance(self._noisy(step, self.model.encode(images).mode()))
        restored = self.model.decode(latent)
        assert self.adversary is not None
        critic = self.adversary.critic
        verdict = self.adversary.step(
            step,
            both=lambda: [critic(torch.cat((images, restored.detach())))],
            made=lambda: [critic(restored.float())],
        )
        reconstruction = log_mse_loss(restored, images)
        features = self.features(restored, images)
        loss = (
            reconstruction
            + self.recipe.feature_weight * features
            + self.recipe.adversarial_weight * verdict
        )
        parts = {}
        if self.recipe.pattern_weight:
            pattern = pattern_loss(restored, images)
            loss = loss + self.recipe.pattern_weight * pattern
            parts["pattern_levels"] = 127.5 * pattern.detach().sqrt()
        if self.recipe.chroma_weight:
            chroma = chroma_loss(restored, images)
            loss = loss + self.recipe.chroma_weight * chroma
            parts["chroma_levels"] = 127.5 * chroma.detach().sqrt()
        return loss, {
            "reconstruction": reconstruction.detach(),
            "features": features.detach(),
            "verdict": verdict.detach(),
            **parts,
            "critic": self.adversary.last_loss,
        }

    def _generators(self, step: int, purpose: int) -> list[torch.Generator]:
        """Randomness of every picture of this process: a function of seed, step and its number."""
        first = self.batch * self.world.rank
        return [
            torch.Generator().manual_seed(derived_seed(self.recipe.seed, step, purpose, first + k))
            for k in range(self.batch)
        ]

    def _noise(self, step: int, purpose: int, like: Tensor) -> Tensor:
        """Standard Gaussian noise of the shape, dtype and device of ``like``."""
        generators = self._generators(step, purpose)
        noise = [torch.randn(like.shape[1:], generator=generator) for generator in generators]
        return torch.stack(noise).to(like)

    def _noisy(self, step: int, latent: Tensor) -> Tensor:
        """Adds noise of a strength that is drawn a picture."""
        largest = self.recipe.latent_noise
        if not largest:
            return latent
        strength = torch.cat([torch.rand(1, generator=g) for g in self._generators(step, 1)])
        strength = largest * strength[:, None, None, None].to(latent)  # (B, 1, 1, 1)
        return latent + strength * self._noise(step, 2, latent)

    @torch.no_grad()
    def _update_statistics(self, normalised: Tensor) -> None:
        """Follows mean and deviation of every latent channel."""
        model = self.model
        values = normalised.detach().float() * model.latent_std + model.latent_mean
        moments = torch.stack((values.mean((0, 2, 3)), values.square().mean((0, 2, 3))))
        self.world.mean_([moments])
        if not bool(torch.isfinite(moments).all()):  # FP16's step is left out, too
            return
        mean, square = moments[:, :, None, None]  # (Z, 1, 1) each
        decay = STATISTICS_DECAY
        variance = (square - mean.square()).clamp_min(1e-6)
        old = model.latent_std.square()
        shift = mean - model.latent_mean
        # Of a mixture of what was followed so far and this batch. New tensors take the old ones'
        # place, as the graph of this step still needs those.
        mixture = decay * old + (1 - decay) * variance + decay * (1 - decay) * shift.square()
        model.latent_std = mixture.sqrt()
        model.latent_mean = model.latent_mean + (1 - decay) * shift

    def validate(self, model: nn.Module, step: int) -> dict[str, float]:
        """PSNR and SSIM on the validation pictures; writes some of them beside their originals."""
        assert isinstance(model, ParScaleEAR)
        restored = self._restored(model, 0)
        shown = [self.validation[:PICTURES_SHOWN], restored[:PICTURES_SHOWN]]
        save_png(grid([list(row) for row in shown]), self.folder / f"validation_{step:07d}.png")
        quality = mean_quality(restored, self.validation)
        if self.recipe.refinements and not self.frozen:
            refined = mean_quality(self._restored(model, self.recipe.refinements), self.validation)
            quality |= {f"refined_{name}": value for name, value in refined.items()}
        return quality

    def _restored(self, model: ParScaleEAR, refinements: int) -> Tensor:
        """The validation pictures' reconstructions, 8-bit."""
        dtype = autocast_dtype(self.recipe.precision, self.world.device)
        return reconstruct_pictures(model, self.validation, refinements=refinements, autocast=dtype)

    def elementwise(self) -> list[nn.Parameter]:
        """None: all are convolutions and biases."""
        return []


class CropsAhead:
    """The batches of consecutive steps, prepared by threads while the model works."""

    def __init__(self, crops: RandomCrops, size: int, first: int, workers: int) -> None:
        self.crops, self.size, self.first, self.workers = crops, size, first, workers
        self._pool = ThreadPoolExecutor(workers) if workers else None
        self._pending: dict[int, Future[Tensor]] = {}

    def batch(self, step: int) -> Tensor:
        """The batch of a step, as ``RandomCrops.batch`` gives it."""
        if self._pool is None:
            return self.crops.batch(step, self.size, self.first)
        for ahead in range(step, step + 2 * self.workers):
            if ahead not in self._pending:
                self._pending[ahead] = self._pool.submit(
                    self.crops.batch, ahead, self.size, self.first
                )
        return self._pending.pop(step).result()
