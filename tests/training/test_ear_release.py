"""The release of an EnergyAR and the comparison of heads, with a judge of a few features."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from parscale_ear import checkpoint
from parscale_ear.autoencoder.files import shipped_weights
from parscale_ear.autoencoder.model import ParScaleEAR
from parscale_ear.cli import main
from parscale_ear.generator.ear import DEFAULT_DECODER, EnergyAR
from parscale_ear.metrics.frechet import frechet_distance
from parscale_ear.metrics.generation import FeatureStatistics
from parscale_ear.training import ear_release, head_comparison, judging, stream_judging
from parscale_ear.training.ear import load_streamed, train_ear
from parscale_ear.training.ear_recipe import EARRecipe
from parscale_ear.training.judging import IMAGENET
from parscale_ear.training.loop import CHECKPOINT_FILE, TrainingError

FEATURES = 12


class FewFeatures:
    """Means of colours over a 2×2 grid: brightness tells the classes."""

    name, distance, dimensions = "few", "FD-few", FEATURES

    def __init__(self, *_: object) -> None:
        pass

    def __call__(self, pictures: Tensor) -> Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(pictures.float() / 255, 2).flatten(1)

    def logits(self, features: Tensor) -> Tensor:
        shade = features.mean(1, keepdim=True)
        logits = torch.full((len(features), 1000), -9.0)
        centres = torch.linspace(0.05, 0.95, len(IMAGENET))
        logits[:, [IMAGENET[folder] for folder in sorted(IMAGENET)]] = -((shade - centres) ** 2)
        return logits


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(ear_release, "FEW", (16,))
    for name, value in (
        ("EfficientNetLite", FewFeatures),
        ("GUIDANCE", (0.0, 2.0)),
        ("TEMPERATURES", (1.0, 0.5)),
        ("TRIED", 20),
        ("JUDGED", 100),
        ("BATCH", 20),
    ):
        monkeypatch.setattr(judging, name, value)
    return


def write_pictures(folder: Path, each: int, seed: int) -> Path:
    """Pictures of 32×32 in each of Imagenette's folders, a shade a class."""
    rng = np.random.default_rng(seed)
    for number, name in enumerate(sorted(IMAGENET)):
        (folder / name).mkdir(parents=True)
        for k in range(each):
            shade = 13 + 25.5 * number * 0.9
            pixels = shade + 12 * rng.standard_normal((32, 32, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name / f"{k}.png")
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """To train on: five of a class."""
    return write_pictures(tmp_path_factory.mktemp("imagenette"), 5, 0)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """To validate on: three of a class."""
    return write_pictures(tmp_path_factory.mktemp("others"), 3, 1)


@pytest.fixture(scope="module")
def latents(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("latents") / "latents"
    assert main(["encode", str(pictures), str(out), "--side", "32", "--mirror"]) == 0
    return out


@pytest.fixture(scope="module")
def recipe(latents: Path) -> EARRecipe:
    return EARRecipe(
        latents=str(latents), validation=str(latents), minutes=None, steps=3, streams=(), depth=1,
        width=16, heads=2, head_width=16, head_blocks=1, noise_channels=4, batch=8,
        precision="fp32",
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(recipe: EARRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    assert train_ear(recipe, out)
    return out / "ear.safetensors"


def test_a_release_is_what_it_says(
    trained: Path, pictures: Path, others: Path, tmp_path: Path
) -> None:
    out, evidence = tmp_path / "weights", tmp_path / "evidence"
    out.mkdir()
    card = f"# Card\n{ear_release.BEGIN}\nold\n{ear_release.END}\nrest\n"
    (out / "ear.md").write_text(card)
    report = ear_release.release(trained, [str(pictures)], [str(others)], out, evidence)
    assert json.loads((evidence / "generation_judged.json").read_text()) == json.loads(
        json.dumps(report)
    )
    tried = report["tried_on_training"]
    assert len(tried) == 4
    best = min(tried, key=lambda row: row["distance"])
    assert report["settings"] == {key: best[key] for key in ("guidance", "temperature")}
    model = EnergyAR.from_pretrained(out / "ear.safetensors")
    assert model.recommended == report["settings"]
    header = checkpoint.load(out / "ear.safetensors")[1]["judged"]
    assert {header[key] for key in ("device", "version", "date")} == {
        report[key] for key in ("device", "version", "date")
    }
    labels = torch.arange(100) % 10
    judge = judging.Judge()
    drawn = judge.look(judging.draw(model, 100, judging.JUDGED_SEED, model.recommended))
    hits = judge.hits(drawn, labels)
    assert report["class_accuracy"]["value"] == pytest.approx(float(hits.float().mean()))
    by_class = report["class_accuracy_by_class"]
    assert list(by_class) == list(model.config.class_names)
    real = judging.load_real([str(others)], model, judge, "real")
    originals = judge.look(real.pictures)
    for name, features in (("_originals", originals), ("", real.restored)):
        assert report["ceiling"][f"class_accuracy{name}"]["value"] == pytest.approx(
            float(judge.hits(features, real.labels).float().mean())
        )
    assert not torch.equal(originals, real.restored)
    expected = frechet_distance(drawn.numpy(), originals.numpy())
    assert report["distance"]["value"] == pytest.approx(expected)
    check_what_is_near(report, drawn, labels, [pictures, others], model, judge)
    known = judging.load_real([str(pictures)], model, judge, "known")
    ceiling = report["ceiling"]
    assert ceiling["distance_pictures"] == 50  # all that there are, where 100 are drawn
    for found, chosen in (
        (ceiling["distance"], slice(None)),
        (ceiling["distance_of_few"]["16"], judging.evenly(known.labels, 16)),
    ):
        assert found == pytest.approx(
            frechet_distance(known.restored[chosen].numpy(), originals.numpy())
        )
    same = frechet_distance(real.restored.numpy(), originals.numpy())
    assert ceiling["distance_of_the_same_pictures"] == pytest.approx(same)
    for found, features, of in (
        (report["diversity"], drawn, labels),
        (ceiling["diversity"], real.restored, real.labels),
    ):
        distances = [torch.pdist(features[of == k]).mean() for k in range(10)]
        assert found == pytest.approx(float(torch.stack(distances).mean()), rel=1e-4)
    statistics = FeatureStatistics.load(out / "imagenette128.safetensors")
    assert statistics.facts["pictures"] == 30
    sharp = checkpoint.load(shipped_weights(decoder="sharp"))[1]["sha256"]
    assert statistics.facts["decoder_sha256"] == report["decoder_sha256"] == sharp
    assert report["statistics_error"] < 1e-4 * expected
    written = (out / "ear.md").read_text()
    assert written.startswith("# Card\n")
    assert written.endswith("\nrest\n")
    assert "old" not in written
    assert f"{report['class_accuracy']['value']:.1%}" in written
    assert f"measured on {report['device']}" in " ".join(written.split())
    for name in ("neighbours.png", "drawn.png"):
        assert (evidence / name).exists()


def check_what_is_near(
    report: dict[str, Any], drawn: Tensor, labels: Tensor, folders: list[Path], model: EnergyAR,
    judge: judging.Judge,
) -> None:  # fmt: skip
    """Nearest pictures, one by one."""
    plain, held_out = (judging.load_real([str(folder)], model, judge, "real") for folder in folders)
    mirrored = judge.look(judging.restore(model, plain.pictures.flip(-1)))
    assert not torch.allclose(mirrored, plain.restored)
    known = torch.cat((plain.restored, mirrored))
    for name, features in (("drawn", drawn), ("held_out", held_out.restored)):
        least = [float((known - one).norm(dim=1).min()) for one in features]
        found = report["nearest_training_picture"][name]
        assert found["q0.5"] == pytest.approx(float(np.quantile(least, 0.5)), rel=1e-3)
        assert found["q0.01"] == pytest.approx(float(np.quantile(least, 0.01)), rel=1e-3)
    both = torch.cat((plain.restored, held_out.restored))
    nearest = [int((both - one).norm(dim=1).argmin()) < len(plain.restored) for one in drawn]
    assert 0 < sum(nearest) < len(nearest)
    assert report["nearest_is_from_training"]["value"] == pytest.approx(np.mean(nearest))
    assert report["nearest_is_from_training"]["by_chance"] == pytest.approx(50 / 80)
    kin = report["nearest_of_its_class"]
    assert kin["pictures"] == 3  # of a class, as there are no more held-out ones
    for name, features, of in (("drawn", drawn, labels), ("held_out", held_out.restored, held_out.labels)):  # fmt: skip
        least = []
        for k in range(10):
            three = features[of == k][:3]
            for n in range(3):
                rest = torch.cat((three[:n], three[n + 1 :]))
                least.append(float((rest - three[n]).norm(dim=1).min()))
        assert kin[name]["q0.5"] == pytest.approx(float(np.quantile(least, 0.5)), rel=1e-3)
        ratios = []
        for k in range(10):
            law = np.linalg.eigvalsh(np.cov(features[of == k][:3].double().numpy().T))
            ratios.append(law.sum() ** 2 / (law**2).sum())
        found = report["effective_dimensions"]
        assert (found["pictures"], found[name]) == (3, pytest.approx(np.mean(ratios), rel=1e-3))


def test_evenly_takes_the_classes_in_turn_and_all_over() -> None:
    labels = torch.arange(3).repeat_interleave(torch.tensor([10, 4, 2]))
    assert judging.evenly(labels, 7).tolist() == [0, 4, 9, 10, 13, 14, 15]
    assert sorted(judging.evenly(labels, 99).tolist()) == list(range(16))


def test_a_damaged_picture_is_left_out_with_its_label(
    trained: Path, others: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "some"
    shutil.copytree(others, folder)
    (folder / sorted(IMAGENET)[0] / "0.png").write_bytes(b"no picture")
    model, judge = EnergyAR.from_pretrained(trained), judging.Judge()
    whole, less = (judging.load_real([str(f)], model, judge, "x") for f in (others, folder))
    assert torch.equal(less.labels, whole.labels[1:])
    assert torch.equal(less.pictures, whole.pictures[1:])


def test_the_chosen_setting_is_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four settings, by number: how far their pictures are, and how often of their class."""
    real = torch.randn(400, 2, generator=torch.Generator().manual_seed(0))
    offsets, accuracies = torch.tensor([0.31, 0.30, 0.32, 3.0]), (0.7, 0.5, 0.6, 1.0)
    settings = list(itertools.product((0.0, 2.0), (1.0, 0.5)))

    class Known:
        classes = tuple(range(10))

        def look(self, pictures: Tensor, name: str) -> Tensor:
            return real[:20] + offsets[int(pictures[0])]

        def hits(self, features: Tensor, labels: Tensor) -> Tensor:
            number = int(((features - real[:20])[0, 0] - offsets).abs().argmin())
            return torch.arange(20) < 20 * accuracies[number]

    def drawn(*arguments: Any) -> Tensor:
        return torch.full((20,), settings.index(tuple(arguments[3].values())))

    monkeypatch.setattr(judging, "draw", drawn)
    training = judging.Real(torch.empty(0), torch.empty(0), real[:20])
    chosen, tried = judging.choose(None, Known(), training)  # type: ignore[arg-type]
    assert [row["accuracy"] for row in tried] == pytest.approx(accuracies)
    assert (chosen["guidance"], chosen["temperature"]) == settings[1]


def test_other_pictures_are_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "pictures" / "cats"
    folder.mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(folder / "0.png")
    told = [str(trained), "--training", str(folder.parent), "--validation", str(folder.parent)]
    evidence = tmp_path / "evidence"
    assert ear_release.main([*told, "--out", str(tmp_path), "--evidence", str(evidence)]) == 2
    assert "ear.md" in capsys.readouterr().err
    (tmp_path / "ear.md").write_text(f"{ear_release.BEGIN}\n{ear_release.END}")
    assert ear_release.main([*told, "--out", str(tmp_path), "--evidence", str(evidence)]) == 2
    assert "'cats' is not a class folder of Imagenette" in capsys.readouterr().err
    assert not (tmp_path / "ear.safetensors").exists()


def test_weights_that_cannot_be_judged_are_refused(
    trained: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ear.md").write_text(f"{ear_release.BEGIN}\n{ear_release.END}")
    few = write_pictures(tmp_path / "few", 1, 0)
    where = ["--out", str(tmp_path), "--evidence", str(tmp_path)]
    told = ["--training", str(pictures), "--validation", str(few), *where]
    assert ear_release.main([str(trained), *told]) == 2
    assert "at least 13 validation pictures, got 10" in capsys.readouterr().err
    for missing in (0, 9):
        lacking = write_pictures(tmp_path / f"without_{missing}", 3, 0)
        shutil.rmtree(sorted(lacking.iterdir())[missing])
        wrong = ["--training", str(pictures), "--validation", str(lacking), *where]
        assert ear_release.main([str(trained), *wrong]) == 2
        name = EnergyAR.load(trained).config.class_names[missing]
        said = capsys.readouterr().err
        assert f"at least two validation pictures of every class are needed: {name}" in said
    model = EnergyAR.load(trained)
    two = EnergyAR(replace(model.config, class_names=("a", "b")))
    two.pyramid.load_state_dict(model.pyramid.state_dict())
    path = two.save_pretrained(tmp_path / "two.safetensors")
    assert ear_release.main([str(path), *told]) == 2
    assert "the generator has 2 classes" in capsys.readouterr().err
    header = {"latent_refinements": 1}
    refined = model.save_pretrained(tmp_path / "refined.safetensors", training=header)
    assert ear_release.main([str(refined), *told]) == 2
    assert "trained on refined latents" in capsys.readouterr().err
    assert not (tmp_path / "ear.safetensors").exists()


def test_a_place_for_evidence_is_looked_at_before_the_work(
    trained: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "ear.md").write_text(f"{ear_release.BEGIN}\n{ear_release.END}")
    monkeypatch.delattr(ear_release, "load_real")
    told = [str(trained), "--training", str(pictures), "--validation", str(pictures)]
    there = str(tmp_path / "ear.md")
    assert ear_release.main([*told, "--out", str(tmp_path), "--evidence", there]) == 2
    assert "ear.md is a file; name a folder" in capsys.readouterr().err


def test_heads_share_the_trunk_and_differ_in_the_head(recipe: EARRecipe) -> None:
    config = recipe.config(("a", "b"), channels=4, side=4)
    models = {kind: head_comparison.build(kind, config, 0) for kind in head_comparison.HEADS}
    first = models.pop("energy").transformer.state_dict()
    for kind, model in models.items():
        assert type(model.head) is head_comparison.HEADS[kind]
        for name, value in model.transformer.state_dict().items():
            assert torch.equal(value, first[name])


def test_a_comparison_goes_on_and_gathers_all_heads(
    recipe: EARRecipe, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [str(pictures)]

    def compare(*heads: str, **changes: Any) -> dict[str, Any]:
        asked = replace(recipe, **changes)
        return head_comparison.compare(asked, heads, paths, paths, tmp_path / "out")

    assert list(compare("gaussian")["heads"]) == ["gaussian"]
    written = (tmp_path / "out" / "gaussian.json").stat().st_mtime_ns
    found = compare(*head_comparison.HEADS)["heads"]
    assert list(found) == list(head_comparison.HEADS)
    assert (tmp_path / "out" / "gaussian.json").stat().st_mtime_ns == written
    assert not any("origin" in row for row in found.values())
    for row in found.values():
        assert row["steps"] == 3
        assert row["distance"]["low"] <= row["distance"]["value"] <= row["distance"]["high"]
        least = min(r["distance"] for r in row["tried_on_training"])
        chosen = [r for r in row["tried_on_training"] if r["distance"] == least]
        assert {k: chosen[0][k] for k in row["settings"]} == row["settings"]
    trunks = {row["parameters"]["trunk"] for row in found.values()}
    assert len(trunks) == 1
    with pytest.raises(TrainingError, match="another batch"):
        compare("gaussian", batch=4)
    other = [str(pictures / next(iter(IMAGENET)))]
    with pytest.raises(TrainingError, match="another validation_pictures"):
        head_comparison.compare(recipe, ("gaussian",), paths, other, tmp_path / "out")
    where = tmp_path / "out" / "gaussian.json"
    stored = json.loads(where.read_text())
    origin = {**stored["origin"], "threads": 77, "date": "2999"}
    where.write_text(json.dumps({**stored, "origin": origin}))
    gathered = compare(*head_comparison.HEADS)  # of what is finished it says what those say
    assert (gathered["threads"], gathered["date"]) == (77, "2999")
    (tmp_path / "out" / "energy.json").unlink()
    with pytest.raises(TrainingError, match="gaussian head was trained with threads 77, not"):
        compare("energy")
    monkeypatch.setattr(head_comparison, "__version__", "99.0")
    with pytest.raises(TrainingError, match="another release"):
        compare("gaussian")


def test_heads_go_on_with_whole_pictures(recipe: EARRecipe, pictures: Path, tmp_path: Path) -> None:
    kinds, paths, out = ("energy", "gaussian", "diffusion"), [str(pictures)], tmp_path / "out"
    asked = replace(
        recipe, picture_steps=2, picture_classes=1, picture_draws=2, picture_pairs=1,
        picture_rate=1e-9, adversarial_weight=0.0, class_weight=0.0,
    )  # fmt: skip
    found = head_comparison.compare(asked, kinds, paths, paths, out)
    assert [row["steps"] for row in found["heads"].values()] == [3, 3, 3]
    assert [row["picture_steps"] for row in found["heads"].values()] == [2, 2, 2]
    for kind in kinds:  # at next to no rate what comes out is what the first stage gave
        first, _ = checkpoint.load(out / kind / CHECKPOINT_FILE)
        then, _ = checkpoint.load(out / kind / "pictures" / CHECKPOINT_FILE)
        names = [name for name in then if name.startswith("model.head")]
        assert names
        for name in names:
            torch.testing.assert_close(then[name], first[f"average{name[5:]}"], atol=1e-6, rtol=0)


def test_streams_are_judged_by_what_they_draw_together(
    recipe: EARRecipe, trained: Path, pictures: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run, paths = tmp_path / "run", [str(pictures)]
    words = [str(run), "--training", *paths, "--validation", *paths]
    assert stream_judging.main(words) == 2
    assert "recipe.json is missing" in capsys.readouterr().err
    asked = replace(
        recipe, start=str(trained), minutes=0, steps=None, streams=(1, 2), stream_steps=3,
        prefix_tokens=2, train_backbone=True,
    )  # fmt: skip
    assert train_ear(asked, run)
    asked_for = json.loads((run / "recipe.json").read_text())
    (run / "recipe.json").write_text(json.dumps({**asked_for, "layout_channels": 0}))  # as 0.6 did
    assert stream_judging.main([*words, "--device", "cuda:99"]) == 2
    assert "cuda" in capsys.readouterr().err.splitlines()[-1]
    assert stream_judging.main([*words, "--device", "cpu"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in told] == ["P = 1", "P = 2"]
    result = json.loads((run / "streams_judged.json").read_text())
    scores = json.loads((run / "streams.json").read_text())
    assert {key: result[key] for key in scores} == scores
    for wrong, message in (
        ({"counts": [2, 4]}, "--streams 1, too"),
        ({"latent_refinements": 1}, "trained on refined latents"),
    ):
        (run / "streams.json").write_text(json.dumps({**scores, **wrong}))
        assert stream_judging.main([*words, "--device", "cpu"]) == 2
        assert message in capsys.readouterr().err
    model, streams = load_streamed(asked, run, 2, torch.device("cpu"))
    autoencoder = ParScaleEAR.from_pretrained(decoder=DEFAULT_DECODER, dtype=torch.float32)
    model.attach(autoencoder).eval()
    judge = judging.Judge()
    drawn = judging.draw(model, 100, judging.JUDGED_SEED, result["settings"], streams=streams)
    originals = judge.look(judging.load_real(paths, model, judge, "real").pictures)
    expected = frechet_distance(judge.look(drawn).numpy(), originals.numpy())
    first, second = result["judged"]
    assert second["distance"]["value"] == pytest.approx(expected, rel=1e-4)
    assert first["distance_minus_first"]["value"] == 0
    rise = second["distance"]["value"] - first["distance"]["value"]
    assert second["distance_minus_first"]["value"] == pytest.approx(rise)
    assert result["distance_slope_per_doubling"]["value"] == pytest.approx(rise)
    assert (run / "streams2.png").exists()
