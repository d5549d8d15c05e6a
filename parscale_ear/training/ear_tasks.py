"""The losses of an EnergyAR's stages: the generator, then parallel streams on it.

Shapes: N latents, B batch, Z channels, S side.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from parscale_ear.data.images import grid, save_png
from parscale_ear.generator.ear import EnergyAR
from parscale_ear.generator.streams import ParallelStreams
from parscale_ear.training.adversary import Adversary, WithAdversary
from parscale_ear.training.distributed import World
from parscale_ear.training.ear_recipe import EARRecipe
from parscale_ear.training.generator_tasks import EACH_WEIGHT, draw
from parscale_ear.training.loop import derived_seed
from parscale_ear.training.picture_critic import PictureCritic
from parscale_ear.training.picture_energy import BATCH, SEEN_SEED, PictureScore, Seen

VALIDATION_BATCH = 128
VALIDATION_SEED = 0  # of the noise, so that figures of different models compare
PICTURES_SHOWN = 8  # a class
CLASSES_SHOWN = 10
GUIDANCE_SHOWN = 2.0
FITTED = 256  # real pictures, about, that give the scale of what the critic sees
CRITIC_WARMUP = 300  # steps before the critic's verdict counts in full
PAIR = 2  # pictures that go on from the same beginning
LARGE_EVERY = 4  # steps, of which Lite0 sees one's pictures at its larger size


@dataclass(frozen=True)
class LatentStore:
    """Latents in memory, as they are and mirrored, and their labels."""

    latents: Tensor  # (N, 1 or 2, Z, S, S), FP32
    labels: Tensor  # (N,), int64

    def __len__(self) -> int:
        """N."""
        return len(self.labels)


def picture_scores(
    model: EnergyAR, store: LatentStore, streams: ParallelStreams | None = None
) -> Tensor:
    """Energy score of every latent, mean over its bands: (N,); not mirrored, noise by seed."""
    device = model.device
    generator = torch.Generator(device).manual_seed(VALIDATION_SEED)
    found = []
    with torch.no_grad():
        for numbers in torch.arange(len(store)).split(VALIDATION_BATCH):
            scores = model.scores(
                store.labels[numbers].to(device),
                store.latents[numbers, 0].to(device),
                streams,
                generator=generator,
            )
            found.append(torch.cat([part.flatten(1) for part in scores], dim=1).mean(1).cpu())
    return torch.cat(found)


class StreamedGenerator(nn.Module):
    """A generator and its streams, which are trained together."""

    def __init__(self, generator: EnergyAR, streams: ParallelStreams) -> None:
        """Holds both."""
        super().__init__()
        self.generator, self.streams = generator, streams


class EARTask(WithAdversary):
    """Energy score of all scales' tokens."""

    def __init__(
        self,
        generator: EnergyAR,
        store: LatentStore,
        validation: LatentStore,
        recipe: EARRecipe,
        folder: Path,
        world: World,
        streams: ParallelStreams | None = None,
    ) -> None:
        """Sets up a stage: of the generator, or of ``streams``, with it or on the frozen one."""
        self.generator, self.streams = generator, streams
        self.model: nn.Module = generator if streams is None else streams  # what is trained
        if streams is not None and recipe.train_backbone:
            self.model = StreamedGenerator(generator, streams)
        self.store, self.validation = store, validation
        self.recipe, self.folder, self.world = recipe, folder, world

    def loss(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean energy score a band."""
        return self.tokens_loss(step, self.recipe.batch)

    def tokens_loss(
        self, step: int, batch: int, *, by_scale: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean energy score a band of ``batch`` latents, and by scale.

        With ``by_scale`` all scales count alike: the first one's single token as much as the many
        of a last one; it says nothing where there are streams.
        """
        recipe, device = self.recipe, self.world.device
        drawn = draw(step, len(self.store), recipe, self.world, batch)
        side = drawn.mirrored.long() % self.store.latents.shape[1]
        latents = self.store.latents[drawn.numbers, side].to(device)
        if recipe.latent_noise:
            noise = torch.randn(latents.shape, generator=self.random(step, 3), device=device)
            latents = latents + recipe.latent_noise * noise
        labels = self.store.labels[drawn.numbers].clone()
        labels[drawn.unlabelled] = self.generator.transformer.null_label
        scores = self.generator.scores(
            labels.to(device),
            latents,
            self.streams,
            samples=recipe.samples,
            alpha=recipe.alpha,
            temperature=recipe.train_temperature,
            input_noise=recipe.input_noise,
            each=self.streams is not None,
            generator=self.random(step, 0),
        )
        if self.streams is None:
            parts = [part.flatten(1) for part in scores]
            means = torch.stack([part.mean() for part in parts])
            figures = {f"scale{k}": mean for k, mean in enumerate(means.detach())}
            return means.mean() if by_scale else torch.cat(parts, dim=1).mean(), figures
        # The streams' own scores count too, so that diverse mode draws well, and the first
        # stream alone can speak for "no label".
        both = torch.cat([part.flatten(2) for part in scores], dim=2)  # (B, 1 + P, ...)
        joined, own = both[:, 0].mean(), both[:, 1:].mean()
        return joined + EACH_WEIGHT * own, {"joined": joined.detach(), "each": own.detach()}

    def random(self, step: int, purpose: int) -> torch.Generator:
        """Randomness of this process in a step."""
        seed = derived_seed(self.recipe.seed, step, purpose, self.world.rank)
        return torch.Generator(self.world.device).manual_seed(seed)

    def elementwise(self) -> list[nn.Parameter]:
        """Embeddings, and what stands between tokens and the trunk."""
        prefix = None if self.streams is None else self.streams.prefix
        prefixes = [] if prefix is None else [prefix]
        if self.model is self.streams:
            return prefixes
        net, head = self.generator.transformer, self.generator.head
        tables: tuple[nn.Module, ...] = (net.class_embedding, net.levels, net.input)
        own = [p for table in tables for p in table.parameters()]
        return [net.start, net.positions, *own, *head.elementwise(), *prefixes]

    def validate(self, model: nn.Module, step: int) -> dict[str, float]:
        """Energy score of the validation latents; writes drawn pictures, a row a class."""
        generator, streams = self.generator, None
        if isinstance(model, ParallelStreams):
            streams = model
        elif isinstance(model, StreamedGenerator):
            generator, streams = model.generator, model.streams
        else:
            assert isinstance(model, EnergyAR)
            generator = model
        classes = min(len(generator.config.class_names), CLASSES_SHOWN)
        images = generator.generate(
            [label for label in range(classes) for _ in range(PICTURES_SHOWN)],
            guidance=GUIDANCE_SHOWN,
            temperature=1.0,
            generator=torch.Generator(self.world.device).manual_seed(self.recipe.seed),
            streams=streams,
            mode="diverse" if streams is None else "aggregate",
        )
        rows = [list(row) for row in images.cpu().unflatten(0, (classes, -1))]
        save_png(grid(rows), self.folder / f"samples_{step:07d}.png")
        scores = picture_scores(generator, self.validation, streams)
        return {"validation_energy_score": float(scores.mean())}


class PicturesTask(EARTask):
    """Scores of whole pictures that the generator drew and a critic's verdict, beside tokens.

    They are drawn freely, or from the first scales of real pictures on: then the critic sees those
    very pictures beside them, and where pictures begin is left to the scores of tokens, so the
    generator cannot settle for the few beginnings that it goes on from best.
    """

    def __init__(
        self,
        generator: EnergyAR,
        store: LatentStore,
        validation: LatentStore,
        recipe: EARRecipe,
        folder: Path,
        world: World,
    ) -> None:
        """Sets up the stage; looks at all real pictures once."""
        super().__init__(generator, store, validation, recipe, folder, world)
        cache = folder / "features.safetensors"
        sides = store.latents.shape[1]
        self.score = PictureScore(
            generator.autoencoder,
            store.latents.flatten(0, 1),
            store.labels.repeat_interleave(sides),
            cache=cache,
            class_weight=recipe.class_weight,
            precision=recipe.precision,
            world=world,
        )
        self.members = [
            torch.nonzero(store.labels == label)[:, 0].numpy()
            for label in range(self.score.classes)
        ]
        if recipe.adversarial_weight:
            critic = PictureCritic(generator.config.channels, self.score.classes)
            spread = np.arange(0, len(store), max(1, len(store) // FITTED))
            chance = torch.Generator().manual_seed(SEEN_SEED)
            with torch.no_grad():
                seen = [
                    self._judged(self.score.look(self._latents(part, None), 0, chance))
                    for part in np.array_split(spread, -(-len(spread) // BATCH))
                ]
                critic.fit([torch.cat(parts) for parts in zip(*seen, strict=True)])
            self.adversary = Adversary(
                critic.to(world.device),
                recipe.critic_rate,
                world,
                betas=(0.0, 0.99),
                warmup_steps=CRITIC_WARMUP,
            )

    def loss(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of all."""
        recipe, device, score = self.recipe, self.world.device, self.score
        # The 1 tells it from what the tokens' batch is drawn with: zeros behind count for nothing.
        rng = np.random.default_rng([recipe.seed, step, 1, self.world.rank])
        chosen = rng.choice(
            score.classes, min(recipe.picture_classes, score.classes), replace=False
        )
        labels = torch.from_numpy(chosen).repeat_interleave(recipe.picture_draws).to(device)
        seed = int(rng.integers(2**31))
        chance = torch.Generator().manual_seed(seed)
        size = int(step % LARGE_EVERY == LARGE_EVERY - 1)
        draws = recipe.picture_draws  # real ones that repeat would make the critic like repetition
        numbers = np.concatenate(
            [
                rng.choice(m, draws, replace=len(m) < draws)
                for m in (self.members[k] for k in chosen)
            ]
        )
        theirs = self._latents(numbers, rng)  # real pictures of the same classes
        known: list[Tensor] = []
        if recipe.picture_known:
            given = int(rng.integers(1, recipe.picture_known + 1))
            known = self.generator.pyramid.encode(theirs)[:given]
        latents = self.generator.draw_with_gradient(labels, self.random(step, 1), known)
        drawn = score.look(latents, size, chance)
        loss, figures = score(drawn, labels, chance)
        if self.adversary is not None:
            with torch.no_grad():
                real = score.look(theirs, size, chance)
            both = [
                torch.cat((maps, ours.detach()))
                for maps, ours in zip(self._judged(real), self._judged(drawn), strict=True)
            ]
            critic, group = self.adversary.critic, recipe.picture_draws
            verdict = self.adversary.step(
                step,
                both=lambda: critic(both, torch.cat((labels, labels)), group),
                made=lambda: critic(self._judged(drawn), labels, group),
            )
            loss = loss + recipe.adversarial_weight * verdict
            figures["verdict"] = verdict.detach()
            figures["told_apart"] = self.adversary.told_apart
        if recipe.picture_pairs:
            pairs = self._continued(rng, size, step, chance)
            loss, figures["pairs"] = loss + pairs, pairs.detach()
        tokens, _ = self.tokens_loss(step, recipe.picture_batch, by_scale=True)
        return loss + tokens, {**figures, "tokens": tokens.detach()}

    def _continued(
        self, rng: np.random.Generator, size: int, step: int, chance: torch.Generator
    ) -> Tensor:
        """Score of pictures that go on from the first scales of real ones."""
        pyramid, count = self.generator.pyramid, self.recipe.picture_pairs
        numbers = rng.integers(len(self.store), size=count)
        with torch.no_grad():
            real = self.score.look(self._latents(numbers, rng), size, chance)
        given = int(rng.integers(1, len(pyramid.scales)))
        known = [part.repeat(PAIR, 1, 1) for part in pyramid.encode(real.latents)[:given]]
        labels = self.store.labels[torch.from_numpy(numbers)].repeat(PAIR).to(self.world.device)
        latents = self.generator.draw_with_gradient(labels, self.random(step, 2), known)
        return self.score.continued(self.score.look(latents, size, chance), real)

    def _latents(self, numbers: NDArray[np.int64], rng: np.random.Generator | None) -> Tensor:
        """Real pictures' latents; ``rng`` mirrors half of them."""
        sides = self.store.latents.shape[1]
        side = np.zeros_like(numbers) if rng is None else rng.integers(sides, size=len(numbers))
        latents = self.store.latents[torch.from_numpy(numbers), torch.from_numpy(side)]
        return latents.to(self.world.device)

    @staticmethod
    def _judged(seen: Seen) -> list[Tensor]:
        """What the critic looks at: four of Lite0's maps, and the latent."""
        return [*(part.float() for part in seen.maps[1:5]), seen.latents.float()]
