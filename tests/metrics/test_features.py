from __future__ import annotations

import hashlib
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from parscale_ear.data.images import from_uint8, resize_and_crop, to_tensor, to_uint8
from parscale_ear.data.reference import wheel_photographs
from parscale_ear.metrics import features
from parscale_ear.metrics.features import (
    INCEPTION_FILE,
    EfficientNetLite,
    FeatureError,
    Inception,
    inception_weights,
    load_extractor,
)
from parscale_ear.metrics.frechet import frechet_distance


@pytest.fixture(scope="module", params=[0, 1])
def extractor(request: pytest.FixtureRequest) -> EfficientNetLite:
    return EfficientNetLite(request.param)


def test_shape_and_determinism(extractor: EfficientNetLite, photographs: torch.Tensor) -> None:
    first, second = extractor(photographs[:3]), extractor(photographs[:3])
    assert first.shape == (3, extractor.dimensions)
    assert first.dtype == torch.float32
    assert torch.equal(first, second)


def test_other_pixels_than_8_bits_are_refused(
    extractor: EfficientNetLite, photographs: torch.Tensor
) -> None:
    with pytest.raises(ValueError, match="8-bit pictures"):
        extractor(from_uint8(photographs[:1]))


def test_knows_what_is_on_a_photograph(extractor: EfficientNetLite) -> None:
    """Its ImageNet classes: the cat is a cat, so weights and preprocessing fit."""
    scenes = dict(wheel_photographs())
    names = ("chelsea", "coffee")
    pictures = torch.stack([to_uint8(to_tensor(resize_and_crop(scenes[n], 256))) for n in names])
    logits = extractor.logits(extractor(pictures))
    assert logits.shape == (2, 1000)
    top = logits.topk(3).indices.tolist()
    assert set(top[0]) & {281, 282, 283, 285}  # tabby, tiger cat, Persian cat, Egyptian cat
    assert set(top[1]) & {967, 968, 504, 505}  # espresso, cup, coffee mug, coffeepot


def test_the_network_is_given_what_it_was_trained_on(extractor: EfficientNetLite) -> None:
    """Its size in pixels, black and white at −1 and 1, and no aliases of fine stripes."""
    given: list[torch.Tensor] = []
    stem = extractor.model.get_submodule("_conv_stem")
    hook = stem.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    side = {"efficientnet-lite0": 224, "efficientnet-lite1": 240}[extractor.name]
    pictures = torch.zeros(3, 3, 3 * side, 3 * side, dtype=torch.uint8)
    pictures[1] = 255
    pictures[2, :, :, ::2] = 255
    try:
        extractor(pictures)
    finally:
        hook.remove()
    ((black, white, stripes),) = given
    assert black.shape == (3, side, side)
    torch.testing.assert_close(black, torch.full_like(black, -127 / 128), atol=2e-3, rtol=0)
    torch.testing.assert_close(white, torch.ones_like(white), atol=2e-3, rtol=0)
    assert stripes.abs().max() < 0.2


def test_the_distance_grows_with_damage(
    extractor: EfficientNetLite, photographs: torch.Tensor
) -> None:
    originals = extractor(photographs).numpy()
    distances = []
    for strength in (0, 8, 32):
        noise = torch.randint(-strength, strength + 1, photographs.shape)
        damaged = (photographs.int() + noise).clamp(0, 255).to(torch.uint8)
        distances.append(frechet_distance(extractor(damaged).numpy(), originals))
    assert distances[0] == pytest.approx(0, abs=1e-6)
    assert np.all(np.diff(distances) > 0)


class TestInception:
    def test_foreign_weights_are_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "weights.pth"
        path.write_bytes(b"not it")
        with pytest.raises(FeatureError, match="not pytorch-fid's"):
            Inception(path)
        for missing in (tmp_path / "missing.pth", str(tmp_path / "missing.pth")):
            with pytest.raises(FeatureError, match="no such file"):
                inception_weights(missing)

    def test_a_named_file_is_not_replaced_by_another_extractor(self, tmp_path: Path) -> None:
        with pytest.raises(FeatureError, match="no such file"):
            load_extractor("auto", weights=tmp_path / "missing.pth")

    def test_weights_of_inception_are_not_ignored_beside_another_extractor(
        self, tmp_path: Path
    ) -> None:
        with pytest.raises(FeatureError, match="efficientnet-lite1 has no use for"):
            load_extractor("efficientnet-lite1", weights=tmp_path / "inception.pth")

    def test_a_cache_that_cannot_be_written_to_is_no_crash(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").touch()
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "file"))
        with pytest.raises(FeatureError, match="--inception-weights"):
            inception_weights()
        assert load_extractor("auto")[0].distance == "FD-EfficientNetLite1"

    def test_no_download_says_where_it_looked(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        with pytest.raises(FeatureError, match=str(tmp_path)):
            inception_weights(download=False)

    def test_a_page_instead_of_the_weights_is_not_taken_for_a_damaged_cache(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))

        def page(_: str, path: str, **__: object) -> None:
            Path(path).write_text("<html>please sign in</html>")

        monkeypatch.setattr(torch.hub, "download_url_to_file", page)
        assert "could not be downloaded" in load_extractor("auto")[1]
        with pytest.raises(FeatureError, match="what was downloaded is not"):
            inception_weights()
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]

    def test_auto_falls_back_by_name(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))

        def no_network(*_: object, **__: object) -> None:
            raise OSError("no network")

        monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
        patience = socket.getdefaulttimeout()
        found, note = load_extractor("auto")
        assert found.distance == "FD-EfficientNetLite1"
        assert "could not be downloaded" in note
        assert str(tmp_path) not in note  # it goes into reports
        assert "--inception-weights" in caplog.text
        assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
        assert socket.getdefaulttimeout() == patience  # of whatever else uses the network

    def test_a_download_is_checked_and_kept(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        content = b"the weights"
        name = f"weights-{hashlib.sha256(content).hexdigest()[:8]}.pth"
        monkeypatch.setattr(features, "INCEPTION_FILE", name)
        sent = [content[:-1], content]  # the first one is cut off
        cached = tmp_path / "hub" / "checkpoints" / name

        def download(url: str, path: str, **_: object) -> None:
            assert not cached.exists()  # until it is known to be whole
            Path(path).write_bytes(sent.pop(0))

        monkeypatch.setattr(torch.hub, "download_url_to_file", download)
        with pytest.raises(FeatureError, match=f"what was downloaded is not {name}"):
            inception_weights()
        assert list(cached.parent.iterdir()) == []
        assert inception_weights() == inception_weights() == cached  # fetched once
        assert cached.read_bytes() == content
        assert list(cached.parent.iterdir()) == [cached]

    def test_features_are_those_that_pytorch_fid_takes(
        self, photographs: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With weights that are drawn, as the published ones are not at hand."""
        from pytorch_fid import inception
        from torchvision.models import Inception3

        with monkeypatch.context() as patch:
            patch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: {})
            patch.setattr(Inception3, "load_state_dict", lambda *_: None)
            torch.manual_seed(0)
            net = inception.fid_inception_v3()
        for convolution in (m for m in net.modules() if isinstance(m, nn.Conv2d)):
            nn.init.kaiming_normal_(convolution.weight)  # so that much is left of a picture
        state = net.state_dict()
        torch.save(state, tmp_path / "weights.pth")
        with monkeypatch.context() as patch:
            patch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: state)
            theirs = inception.InceptionV3([inception.InceptionV3.BLOCK_INDEX_BY_DIM[2048]]).eval()
        monkeypatch.setattr(features, "_check_digest", lambda weights: None)
        loader = inception.load_state_dict_from_url
        ours = Inception(tmp_path / "weights.pth")
        assert inception.load_state_dict_from_url is loader  # for whoever else uses it
        found = ours(photographs[:2])
        with torch.inference_mode():
            expected = theirs(photographs[:2] / 255)[0].flatten(1)
        assert found.shape == (2, ours.dimensions)
        assert float((found[0] - found[1]).abs().max()) > 0.01
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(ours.logits(found), found @ state["fc.weight"].T)  # no bias

    def test_a_damaged_file_in_the_cache_is_told_as_such(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "checkpoints" / INCEPTION_FILE).write_bytes(b"half of it")
        found, note = load_extractor("auto")
        assert found.distance == "FD-EfficientNetLite1"
        assert "damaged" in note
        assert "downloaded" not in note


def test_unknown_name() -> None:
    with pytest.raises(FeatureError, match="auto, inception, efficientnet-lite1 or -lite0"):
        load_extractor("resnet")  # type: ignore[arg-type]
