from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from parscale_ear import checkpoint
from parscale_ear.autoencoder.model import ParScaleEAR
from parscale_ear.autoencoder.reconstruct import reconstruct_pictures
from parscale_ear.data.images import find_images, from_uint8, load_squares
from parscale_ear.metrics.features import load_extractor
from parscale_ear.metrics.frechet import frechet_distance
from parscale_ear.metrics.reconstruction import psnr
from parscale_ear.training import release
from parscale_ear.training.autoencoder import train_autoencoder
from parscale_ear.training.recipe import Recipe, named_release

CARD = f"# Card\n{release.BEGIN}\n{release.END}\nend\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("timm", reason="training needs the extra 'train'")
    from parscale_ear.data.images import save_png

    folder = tmp_path_factory.mktemp("release")
    (folder / "pictures").mkdir()
    generator = torch.Generator().manual_seed(0)
    for index in range(4):
        pixels = torch.rand(3, 96, 96, generator=generator) * 2 - 1
        save_png(pixels, folder / "pictures" / f"{index}.png")
    recipe = Recipe(
        images=(str(folder / "pictures"),),
        minutes=None,
        steps=4,
        batch=1,
        crop=32,
        final_crop=32,
        precision="fp32",
    )
    out = folder / "run"
    assert train_autoencoder(recipe, out)
    return out


def test_stages_are_labelled_by_their_release(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of one release are trained on before the number of the next one is known."""
    ship = ["--validation", str(run.parent / "pictures"), "--out"]
    for folder, version in (("first", "0.7.0"), ("second", "0.8.0")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "README.md").write_text(CARD)
        if folder == "second":
            recipe = Recipe(
                images=(str(run.parent / "pictures"),), start=str(tmp_path / "first" / "hybrid.safetensors"),
                minutes=None, steps=4, batch=1, crop=32, final_crop=32, precision="fp32",
                grey_share=0.25, latent_noise=0.4,
            )  # fmt: skip
            assert train_autoencoder(recipe, tmp_path / "run")
        monkeypatch.setattr(release, "__version__", version)
        source = run if folder == "first" else tmp_path / "run"
        assert release.main([str(source), *ship, str(tmp_path / folder)]) == 0
    first, second = ((tmp_path / f / "README.md").read_text() for f in ("first", "second"))
    assert "(0." not in first
    rows = [line.split(" | ")[0] for line in second.splitlines() if " trained " not in line]
    labels = [row for row in rows if row.startswith(("| vae", "| hybrid", "| sharp", "| base"))]
    assert [
        "25 % grey, noise up to σ 0.4" in row
        for row in second.splitlines()
        if "| 1 of 32×32" in row
    ] == ["(0.7)" not in label for label in labels]
    assert labels == ["| vae (0.7)", "| hybrid (0.7)", "| vae", "| hybrid", "| sharp", "| baseline"]


def test_stages_that_shipped_without_a_label_are_of_05(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights of 0.5 lack the label; some of their files may ship again."""
    monkeypatch.setattr(release, "__version__", "0.6.0")
    mixed, out = tmp_path / "mixed", tmp_path / "out"
    shutil.copytree(run, mixed)
    for name in ("hybrid", "baseline"):  # as 0.5 shipped them: measured on named data, no label
        path = mixed / f"{name}.safetensors"
        facts = checkpoint.load(path)[1]["training"]
        facts["validation"]["data"] = ["photos.tar"]
        for stage in facts["history"]:
            stage["seed"] = 3
        ParScaleEAR.from_pretrained(path).save_pretrained(path, training=facts)
    out.mkdir()
    (out / "README.md").write_text(CARD)
    assert (
        release.main([str(mixed), "--validation", str(run.parent / "pictures"), "--out", str(out)])
        == 0
    )
    labels = {}
    for name in release.SHARED:
        stages = checkpoint.load(out / f"{name}.safetensors")[1]["training"]["history"]
        labels[name] = {stage["release"] for stage in stages}
    assert labels == {"hybrid": {"0.5"}, "baseline": {"0.5"}, "sharp": {"0.6.0"}}
    card = (out / "README.md").read_text()
    assert "| baseline (0.5) |" in card
    assert "| sharp |" in card
    assert "seed 0." in card  # the sharp stage's, although the baseline's stands last


def test_the_names_of_stages_up_to_05() -> None:
    assert named_release({"stage": "vae (0.3)"}) == ("vae", "0.3")
    assert named_release({"stage": "vae"}) == ("vae", "0.5")
    assert named_release({"stage": "vae", "release": "0.6.1"}) == ("vae", "0.6")


def test_ships_half_precision_and_its_own_figures(run: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(CARD)
    source = str(run.parent / "pictures")
    options = ["--validation", source, "--training", source, "--out", str(tmp_path)]
    assert release.main([str(run), *options]) == 0
    card = (tmp_path / "README.md").read_text()
    whole = ParScaleEAR.from_pretrained(tmp_path / "hybrid.safetensors")
    squares = load_squares(find_images([source]))
    with torch.inference_mode():
        latent = whole.encode(from_uint8(squares)).mode().transpose(0, 1).flatten(1)
    mean, deviation = latent.mean(1), latent.std(1, correction=0)
    assert (
        f"a channel of the latent has a mean of {mean.min():.3f} to {mean.max():.3f} and a "
        f"deviation of {deviation.min():.3f} to {deviation.max():.3f}."
    ) in card
    for name, label in release.NAMES.items():
        path = tmp_path / f"{name}.safetensors"
        tensors, header = checkpoint.load(path)
        assert {t.dtype for t in tensors.values()} == {torch.float16}
        model, trained = (ParScaleEAR.from_pretrained(f / path.name) for f in (tmp_path, run))
        assert header["latent_fingerprint"] == model.latent_fingerprint()
        for a, b in zip(model.state_dict().values(), trained.state_dict().values(), strict=True):
            assert torch.equal(a, b.half().float())
        figures = header["training"]["validation"]
        assert figures["precision"] == "float32"
        row = f"| `{name}.safetensors` | {label} | {figures['psnr_db']:.2f} "
        assert row in card
        restored = reconstruct_pictures(model, squares)
        laws = [load_extractor("efficientnet-lite1")[0](x).numpy() for x in (restored, squares)]
        assert figures["distance"] == pytest.approx(frechet_distance(*laws), rel=1e-3)
        assert figures["distance_name"] == "FD-EfficientNetLite1"
        luma = (squares * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
        greys = reconstruct_pictures(model, luma.round().to(torch.uint8).expand(-1, 3, -1, -1))
        spread = (greys.amax(1) - greys.amin(1)).double().mean().item()
        assert figures["grey_chroma"] == pytest.approx(spread, abs=6e-4)
        assert spread > 0.1
        assert (
            f"{label} {figures['grey_chroma']:.1f}"
            in card.split("given in grey")[1].splitlines()[0]
        )
    refined = checkpoint.load(tmp_path / "hybrid.safetensors")[1]["training"]["refined"]
    restored = reconstruct_pictures(whole, squares, refinements=1)
    assert refined["psnr_db"] == pytest.approx(psnr(restored, squares).mean(), abs=1e-3)
    assert f"faithful, latents refined once | {refined['psnr_db']:.2f} " in card
    stages = [stage["stage"] for stage in header["training"]["history"]]
    assert stages == ["vae", "hybrid", "baseline"]
    for stage in ("vae", "hybrid", "baseline", "sharp"):
        assert card.count(f"\n| {stage} |") == 1
    assert card.startswith("# Card\n")
    assert card.endswith("end\n")
    whole, *parts = ((tmp_path / f"{n}.safetensors").stat().st_size for n in release.SHARED)
    assert all(part < 0.6 * whole for part in parts)


def test_runs_of_two_latent_spaces_are_refused(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    path = other / "hybrid.safetensors"
    model = ParScaleEAR.from_pretrained(path)
    with torch.no_grad():
        model.encoder.level2.bias += 1
    model.save_pretrained(path, training={})
    (tmp_path / "README.md").write_text(CARD)
    with pytest.raises(ValueError, match="one latent space"):
        release.release(other, [str(run.parent / "pictures")], tmp_path)


@pytest.mark.parametrize(
    ("name", "part"), [("sharp", "hybrid"), ("sharp", "decoder.features4")]
)  # fmt: skip
def test_what_is_stored_once_must_be_the_same(
    name: str, part: str, run: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    path = other / f"{name}.safetensors"
    model = ParScaleEAR.from_pretrained(path)
    with torch.no_grad():
        next(model.get_submodule(part).parameters()).add_(1)
    model.save_pretrained(path, training={})
    (tmp_path / "README.md").write_text(CARD)
    with pytest.raises(ValueError, match=r"sharp\.safetensors has another .*decoder\.features4"):
        release.release(other, [str(run.parent / "pictures")], tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_mistakes_are_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--validation", str(run.parent / "pictures"), "--out", str(tmp_path)]
    assert release.main([str(run), *options]) == 2
    (tmp_path / "README.md").write_text("no marks")
    assert release.main([str(run), *options]) == 2
    assert "lacks the marks" in capsys.readouterr().err
    (tmp_path / "README.md").write_text(CARD)
    assert release.main([str(tmp_path), *options]) == 2
    assert not list(tmp_path.glob("*.safetensors"))


def test_the_shipped_card_says_what_the_headers_say() -> None:
    folder = Path(release.__file__).parents[1] / "weights"
    facts = {
        name: checkpoint.load(folder / f"{name}.safetensors")[1]["training"]
        for name in release.SHARED
    }
    card = (folder / release.CARD).read_text(encoding="utf-8")
    assert release.with_figures(card, facts) == card


def test_the_shipped_weights_are_small() -> None:
    folder = Path(release.__file__).parents[1] / "weights"
    sizes = {path.stem: path.stat().st_size for path in folder.glob("*.safetensors")}
    assert sizes.pop("ear") <= 16_000_000
    assert sizes.pop("imagenette128") <= 3_000_000
    assert sum(sizes.values()) <= 7_000_000  # the autoencoder's


def test_what_ends_it_half_way_leaves_the_shipped_weights_whole(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "README.md").write_text(CARD)
    measure, names = release.measure, []

    def stops(*arguments: Any, **options: Any) -> dict[str, Any]:
        names.append(arguments[-1])
        if len(names) == 3:
            raise KeyboardInterrupt
        return measure(*arguments, **options)

    monkeypatch.setattr(release, "measure", stops)
    with pytest.raises(KeyboardInterrupt):
        release.release(run, [str(run.parent / "pictures")], tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))  # new ones would not fit the others
