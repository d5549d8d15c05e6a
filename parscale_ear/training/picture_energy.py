"""The energy score of whole pictures: what a token's score cannot see.

The score of :mod:`parscale_ear.generator.energy` teaches every band what may follow what is known;
nothing there asks whether the tokens of one pass belong together, or what a draw looks like that
was made from draws. Here a generator draws freely, and its pictures of a class are scored as one
sample of that class against all real ones: in pooled features of EfficientNet-Lite0 at two sizes,
in the latent, in the latent's 2×2 patches, and in 16×16 pixels. And it goes on from the first scales
of a real picture, twice, and both ends are scored against that picture. Every term is an energy
score, so each is smallest for the true law of what it looks at. Matching a law in a pretrained network's
features is after Santos et al., "Learning Implicit Generative Models by Matching Perceptual
Features" (ICCV 2019), with means and deviations in place of an energy score. Lite0 takes part in
training, so it must not judge the result.

A linear classifier on Lite0's pooled features, fitted to the real pictures, says beside it whether a
picture is what it was asked to be, as in Sauer et al., "StyleGAN-XL" (SIGGRAPH 2022). It is no
energy score; its weight is small.

Real pictures are the autoencoder's reconstructions: the latents tell all. Lite0 sees real and drawn
ones moved, tinted and with noise, so that no pattern of single pixels counts (as in Zhao et al.,
"Differentiable Augmentation for Data-Efficient GAN Training", NeurIPS 2020).

Shapes: N latents, B draws, M observations, D features, Z channels, S side of the latent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parscale_ear import checkpoint
from parscale_ear.autoencoder.model import ParScaleEAR
from parscale_ear.generator.energy import energy_score
from parscale_ear.training.distributed import OneProcess, World
from parscale_ear.training.lite_maps import LiteMaps
from parscale_ear.training.loop import Precision, autocast_for, resolve_precision

SIZES = (1.0, 1.375)  # of the pictures that Lite0 sees, in their own side
SMALL = 16  # side of the small pictures, pixels
PATCH = 2  # side of the latent's patches
DRAWN_PATCHES, REAL_PATCHES = 256, 768  # a class and step
# Of a feature map's moments, of the last one's, and of the rest.
WEIGHTS = {"maps": 0.25, "last": 1.0, "latent": 1.0, "patch": 1.0, "small": 1.0}
RANGE_WEIGHT = 2.0  # of what leaves [−1, 1], squared
CLASSIFIER_STEPS, CLASSIFIER_DECAY = 60, 1e-2  # of fitting the classifier
PIXEL_NOISE = 0.03  # deviation, on real and drawn: no fine pattern of a few grey levels may count
SHIFT = 1 / 16  # of the side: by how much a picture is moved at most
BRIGHTNESS, SATURATION, CONTRAST = 0.1, 0.2, 0.15  # by how much they change at most
SEEN_SEED = 0  # of what is done to the real pictures
BATCH = 32  # real pictures at a time
FLOOR = 1e-3  # of a feature's deviation


def ensemble_score(draws: Tensor, observations: Tensor) -> Tensor:
    """Energy score of one set of draws, mean over observations.

    The mean of ``energy_score(draws, y)`` over all ``y``; a scalar.

    Args:
        draws: (B, D), B ≥ 2.
        observations: (M, D).
    """
    count = len(draws)
    # By a matrix product, in FP32: the gradient of torch.cdist takes its time on a CPU.
    with torch.autocast(draws.device.type, enabled=False):
        products = draws @ observations.T
    near_squares = draws.square().sum(1, keepdim=True) + observations.square().sum(1) - 2 * products
    near = near_squares.clamp_min(1e-12).sqrt().mean()
    squares = (draws[:, None] - draws[None]).square().sum(-1)
    apart = squares.clamp_min(1e-12).sqrt().sum() - count * 1e-6  # the diagonal is 0
    return near - 0.5 * apart / (count * (count - 1))


@dataclass(frozen=True)
class Seen:
    """Latents, and what Lite0 sees of their pictures."""

    latents: Tensor  # (B, Z, S, S)
    pictures: Tensor  # (B, 3, 16S, 16S), not clamped
    maps: list[Tensor]  # from fine to coarse, (B, C, H, W) each
    size: int  # which of ``SIZES`` it saw


class PictureScore(nn.Module):
    """Scores drawn latents of a class against all real ones of it."""

    def __init__(
        self,
        autoencoder: ParScaleEAR,
        latents: Tensor,
        labels: Tensor,
        *,
        cache: Path | None = None,
        class_weight: float = 0.0,
        precision: Precision = "auto",
        world: World | None = None,
    ) -> None:
        """Looks at all real pictures once.

        Args:
            autoencoder: gets frozen; on the device that this shall work on.
            latents: (N, Z, S, S), normalised.
            labels: (N,), int64.
            cache: file for what was seen, so that a resumed run need not look again; written
                anew if it is of other latents or of another precision. One for all processes.
            class_weight: of the classifier's cross-entropy.
            precision: that real pictures are seen in; drawn ones are scored in the caller's, which
                must be the same.
            world: the processes, which share the looking; None: one.

        Raises:
            FeatureError: Lite0's packages are missing.
            ValueError: a class has no latents.
        """
        super().__init__()
        self.classes = int(labels.max()) + 1
        members = [labels == label for label in range(self.classes)]
        if empty := [label for label, chosen in enumerate(members) if not chosen.any()]:
            raise ValueError(f"no latents of the classes {', '.join(map(str, empty))}")
        self.autoencoder = autoencoder.requires_grad_(False)
        self.device = autoencoder.device
        self.world: World = world or OneProcess(self.device)
        self.network = LiteMaps(self.device)
        self.precision = resolve_precision(precision, self.device)
        seen = self._look_at_all(latents, cache)
        self.means = [[f.mean(0) for f in features] for features in seen]
        self.deviations = [[f.std(0) + FLOOR for f in features] for features in seen]
        self.real = [
            [
                [f[chosen] for f in self._normalised(features, size)]
                for size, features in enumerate(seen)
            ]
            for chosen in members
        ]  # a class, a size, a map: (M, D)
        self.class_weight = class_weight
        self.classifiers = [
            _fit_classifier(self._normalised(features, size)[-1], labels.to(self.device))
            for size, features in enumerate(seen)
        ]
        self.latents = [latents[chosen].to(self.device) for chosen in members]
        small = self._small_pictures(latents)
        self.small = [small[chosen] for chosen in members]

    @torch.no_grad()
    def _look_at_all(self, latents: Tensor, cache: Path | None) -> list[list[Tensor]]:
        """A size, a map: (N, D) features of all real pictures."""
        looked_at = {
            "latents": checkpoint.digest({"latents": latents}),
            "autoencoder": checkpoint.digest(self.autoencoder.state_dict()),
            "sizes": list(SIZES),
            "precision": self.precision,
            "seen": [PIXEL_NOISE, SHIFT, BRIGHTNESS, SATURATION, CONTRAST],
        }
        if cache is not None and cache.exists():
            tensors, header = checkpoint.load(cache, kind="PictureFeatures")
            if header["config"] == looked_at:
                maps = len(tensors) // len(SIZES)
                return [
                    [tensors[f"{size}.{k}"].to(self.device) for k in range(maps)]
                    for size in range(len(SIZES))
                ]

        def look(number: int, rows: slice) -> list[Tensor]:
            batch, moments = latents[rows].to(self.device), []
            for size in range(len(SIZES)):
                seed = SEEN_SEED + number * len(SIZES) + size
                moments += _moments(self.look(batch, size, torch.Generator().manual_seed(seed)))
            return moments

        parts = self._share(len(latents), look)
        maps = len(parts) // len(SIZES)
        found = [parts[size * maps : (size + 1) * maps] for size in range(len(SIZES))]
        if cache is not None and self.world.rank == 0:
            tensors = {
                f"{s}.{k}": f.cpu() for s, row in enumerate(found) for k, f in enumerate(row)
            }
            checkpoint.save(cache, tensors, kind="PictureFeatures", config=looked_at)
        return found

    def pictures(self, latents: Tensor) -> Tensor:
        """(B, Z, S, S) → (B, 3, 16S, 16S), not clamped."""
        latents = latents.to(memory_format=torch.channels_last)
        return self.autoencoder.decode(self.autoencoder.enhance(latents))

    def look(self, latents: Tensor, size: int, generator: torch.Generator | None = None) -> Seen:
        """Shows pictures to Lite0.

        Args:
            latents: (B, Z, S, S), real or drawn.
            size: which of ``SIZES``.
            generator: of what is done to the pictures, on the CPU.
        """
        pictures = self.pictures(latents)
        shown = _changed(pictures.float().clamp(-1, 1), generator)
        if SIZES[size] != 1:
            side = round(SIZES[size] * pictures.shape[-1])
            shown = F.interpolate(shown, (side, side), mode="bilinear", align_corners=False)
        return Seen(latents, pictures, self.network(shown), size)

    def _normalised(self, features: Sequence[Tensor], size: int) -> list[Tensor]:
        """Unit variance over all real pictures, and about unit length."""
        rows = zip(features, self.means[size], self.deviations[size], strict=True)
        return [(f - mean) / (deviation * f.shape[1] ** 0.5) for f, mean, deviation in rows]

    def _small_pictures(self, latents: Tensor) -> Tensor:
        """Real pictures of ``SMALL`` pixels a side, flat: (N, D)."""
        (found,) = self._share(
            len(latents),
            lambda _, rows: [_small(self.pictures(latents[rows].to(self.device)))],
        )
        return found

    @torch.no_grad()
    def _share(self, count: int, look: Callable[[int, slice], Sequence[Tensor]]) -> list[Tensor]:
        """What there is to see of all real pictures; the processes share the looking.

        Args:
            count: of pictures.
            look: number and rows of a batch → (B, D) each.

        Returns:
            (count, D) each, the same in all processes.
        """
        starts = range(0, count, BATCH)
        found: list[Tensor] = []
        for number in range(min(self.world.rank, len(starts) - 1), len(starts), self.world.size):
            rows = slice(starts[number], min(starts[number] + BATCH, count))
            with autocast_for(self.precision, self.device):
                seen = look(number, rows)
            if not found:
                # Before the loop has split the heap up: rows that are kept among feature maps
                # that are not would hold on to gigabytes of freed memory.
                found = [part.new_zeros(count, part.shape[1]) for part in seen]
            if number % self.world.size == self.world.rank:  # else it tells the sizes alone
                for whole, part in zip(found, seen, strict=True):
                    whole[rows] = part
        self.world.mean_(found)  # of one process's rows and the others' zeros
        return [whole * self.world.size for whole in found] if self.world.size > 1 else found

    def forward(
        self, seen: Seen, labels: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Scores draws.

        Args:
            seen: of B drawn latents, at least two of every class.
            labels: (B,), their classes.
            generator: of the patches, on the CPU.

        Returns:
            The weighted sum, a scalar, and its parts.
        """
        features = self._normalised(_moments(seen), seen.size)
        small = _small(seen.pictures)
        scores: dict[str, list[Tensor]] = {
            k: [] for k in ("maps", "last", "latent", "patch", "small")
        }
        for label in labels.unique().tolist():
            rows = labels == label
            pairs = list(zip(features, self.real[label][seen.size], strict=True))
            found = [ensemble_score(ours[rows], theirs) for ours, theirs in pairs]
            scores["maps"].append(torch.stack(found[:-1]).sum())
            scores["last"].append(found[-1])
            drawn, real = seen.latents[rows].float(), self.latents[label]
            scores["latent"].append(ensemble_score(_flat(drawn), _flat(real)))
            ours, theirs = (
                _patches(part, count, generator)
                for part, count in ((drawn, DRAWN_PATCHES), (real, REAL_PATCHES))
            )
            scores["patch"].append(ensemble_score(ours, theirs))
            scores["small"].append(ensemble_score(small[rows], self.small[label]))
        parts = {name: torch.stack(values).mean() for name, values in scores.items()}
        parts["class"] = F.cross_entropy(
            _classify(self.classifiers[seen.size], features[-1]), labels
        )
        parts["range"] = F.relu(seen.pictures.float().abs() - 1).square().mean()
        weights = {**WEIGHTS, "range": RANGE_WEIGHT, "class": self.class_weight}
        total = torch.stack([weights[name] * part for name, part in parts.items()]).sum()
        return total, parts

    def continued(self, drawn: Seen, real: Seen) -> Tensor:
        """Scores draws that go on from what is known of a picture against that picture.

        A set of draws is scored as well by a handful of pictures that come again and again as by
        as many as there are real ones, nearly: among so many numbers a repetition costs little.
        Two draws from the same beginning must lie as far apart as each lies from the truth.

        Args:
            drawn: M draws of each of B pictures, (M · B), M ≥ 2: of all pictures, then again.
            real: of the B pictures, seen at the same size.

        Returns:
            The weighted sum, a scalar.
        """
        ours, theirs = (
            [
                *self._normalised(_moments(seen), seen.size),
                _flat(seen.latents),
                _small(seen.pictures.clamp(-1, 1)),
            ]
            for seen in (drawn, real)
        )
        count = len(real.latents)
        found = [
            energy_score(own.unflatten(0, (-1, count)), target).mean()
            for own, target in zip(ours, theirs, strict=True)
        ]
        names = [*["maps"] * (len(found) - 3), "last", "latent", "small"]
        return torch.stack([WEIGHTS[n] * part for n, part in zip(names, found, strict=True)]).sum()


def _moments(seen: Seen) -> list[Tensor]:
    """Mean and deviation of every feature map: a map (B, D), FP32."""
    found = []
    for part in seen.maps:
        part = part.float()
        deviation = part.var((2, 3), correction=0).clamp_min(1e-6).sqrt()
        found.append(torch.cat((part.mean((2, 3)), deviation), dim=1))
    return found


@torch.enable_grad()
def _fit_classifier(features: Tensor, labels: Tensor) -> Tensor:
    """Logistic regression: (N, D) normalised features, (N,) → weights (C, D + 1)."""
    weights = features.new_zeros(int(labels.max()) + 1, features.shape[1] + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=CLASSIFIER_STEPS)

    def loss() -> Tensor:
        optimizer.zero_grad()
        error = F.cross_entropy(_classify(weights, features), labels)
        error = error + CLASSIFIER_DECAY * weights.square().sum()
        torch.autograd.backward(error)
        return error

    optimizer.step(loss)
    return weights.detach()


def _classify(weights: Tensor, features: Tensor) -> Tensor:
    """(C, D + 1), (B, D) normalised features → (B, C)."""
    with torch.autocast(features.device.type, enabled=False):
        scaled = features * features.shape[1] ** 0.5  # unit variance each
        logits: Tensor = scaled @ weights[:, :-1].T + weights[:, -1]
    return logits


def _changed(pictures: Tensor, generator: torch.Generator | None) -> Tensor:
    """Moves, tints and disturbs every picture by chance: (B, 3, H, W)."""
    count, device = len(pictures), pictures.device

    def chance(most: float) -> Tensor:
        drawn = most * (2 * torch.rand(count, 1, 1, 1, generator=generator) - 1)
        return drawn.to(device)

    reach = round(SHIFT * pictures.shape[-1])
    wide = F.pad(pictures, (reach,) * 4, mode="reflect")
    height, width = pictures.shape[-2:]
    moves = torch.randint(2 * reach + 1, (count, 2), generator=generator).tolist()
    x = torch.stack(
        [part[:, y : y + height, x : x + width] for part, (y, x) in zip(wide, moves, strict=True)]
    )
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * (1 + chance(SATURATION))
    mean = x.mean((1, 2, 3), keepdim=True)
    x = mean + (x - mean) * (1 + chance(CONTRAST)) + chance(BRIGHTNESS)
    return x + PIXEL_NOISE * torch.randn(x.shape, generator=generator).to(x)


def _flat(values: Tensor) -> Tensor:
    """(B, ...) → (B, D), of about unit length where the values have unit variance."""
    flat = values.float().flatten(1)
    length: float = flat.shape[1] ** 0.5
    return flat / length


def _small(pictures: Tensor) -> Tensor:
    return _flat(F.adaptive_avg_pool2d(pictures.float(), SMALL))


def _patches(latents: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """Random patches of the latents, flat: (count, D)."""
    rows = torch.randint(len(latents), (count,), generator=generator)
    places = latents.shape[-1] - PATCH + 1
    ys, xs = (torch.randint(places, (count,), generator=generator) for _ in range(2))
    offsets = torch.arange(PATCH)
    ys, xs = ys[:, None, None] + offsets[:, None], xs[:, None, None] + offsets
    return _flat(latents.permute(0, 2, 3, 1)[rows[:, None, None], ys, xs])
