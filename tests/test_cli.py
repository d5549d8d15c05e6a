from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tarfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from parscale_ear.autoencoder import reconstruct
from parscale_ear.autoencoder.model import ParScaleEAR
from parscale_ear.cli import main
from parscale_ear.data.images import find_images, from_uint8, load_squares
from parscale_ear.data.latents import LatentDataset
from parscale_ear.data.reference import wheel_photographs
from parscale_ear.device import UsageError
from parscale_ear.places import check_output
from parscale_ear.training.ear_recipe import EARRecipe
from parscale_ear.training.generator_recipe import VARRecipe
from parscale_ear.training.recipe import Recipe
from parscale_ear.verbs import train
from parscale_ear.verbs.common import positive


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A photograph of a size off the grid."""
    path = tmp_path_factory.mktemp("photo") / "chelsea.png"
    dict(wheel_photographs())["chelsea"].crop((0, 0, 203, 171)).save(path)
    return path


class TestReconstruct:
    def test_pictures_and_psnr(
        self, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "new" / "out"
        assert main(["reconstruct", str(photo), "--out", str(out), "--compare"]) == 0
        restored = np.asarray(Image.open(out / "chelsea.png")).astype(float)
        original = np.asarray(Image.open(photo)).astype(float)
        assert restored.shape == original.shape
        expected = 10 * np.log10(255**2 / np.square(restored - original).mean())
        printed = capsys.readouterr().out
        assert f"{expected:.2f} dB" in printed
        pair = np.asarray(Image.open(out / "chelsea_compare.png"))
        assert pair.shape == (171, 203 * 2 + 8, 3)
        np.testing.assert_array_equal(pair[:, :203], original)
        np.testing.assert_array_equal(pair[:, -203:], restored)
        assert sorted(p.name for p in out.iterdir()) == ["chelsea.png", "chelsea_compare.png"]

    def test_a_picture_that_comes_back_exactly_counts_as_100_db(
        self,
        photo: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(reconstruct, "reconstruct_image", lambda model, image, **_: image)
        assert main(["reconstruct", str(photo), "--out", str(tmp_path / "out")]) == 0
        rows = capsys.readouterr().out.splitlines()
        assert "inf dB" in rows[0]
        assert "100.00 dB PSNR over 1 pictures" in rows[1]

    def test_what_is_done_is_told_though_a_later_picture_fails(
        self,
        photo: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def fails_at_the_second(model: object, image: torch.Tensor, **_: object) -> torch.Tensor:
            if (tmp_path / "out" / "chelsea.png").exists():
                raise ValueError("the reconstructions were not finite")
            return image

        monkeypatch.setattr(reconstruct, "reconstruct_image", fails_at_the_second)
        (tmp_path / "second.png").write_bytes(photo.read_bytes())
        words = [str(photo), str(tmp_path / "second.png"), "--out", str(tmp_path / "out")]
        assert main(["reconstruct", *words]) == 2
        assert "inf dB" in capsys.readouterr().out

    @pytest.mark.parametrize("tile", [None, 64])
    def test_a_picture_too_large_for_the_memory_does_not_stop_the_others(
        self, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch, tile: int | None,
    ) -> None:  # fmt: skip
        whole = reconstruct.reconstruct_image

        def too_large(model: Any, picture: torch.Tensor, **options: Any) -> torch.Tensor:
            if picture.shape[-1] == 640:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
            return whole(model, picture, **options)

        monkeypatch.setattr(reconstruct, "reconstruct_image", too_large)
        Image.new("RGB", (640, 32)).save(tmp_path / "a.png")
        Image.new("RGB", (64, 32)).save(tmp_path / "b.png")
        words = [*(str(tmp_path / f"{name}.png") for name in "ab"), "--out", str(tmp_path / "out")]
        assert main(["reconstruct", *words, *(["--tile", str(tile)] if tile else [])]) == 2
        said = f"a.png: out of memory; try a smaller --tile than {tile or 'the whole picture'}"
        assert said in capsys.readouterr().err
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["b.png"]

    def test_a_damaged_picture_does_not_stop_the_others(
        self, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = tmp_path / "in"
        folder.mkdir()
        (folder / "a.png").write_text("no picture")
        (folder / "b.png").write_bytes(photo.read_bytes())
        assert main(["reconstruct", str(folder), "--out", str(tmp_path / "out")]) == 2
        captured = capsys.readouterr()
        assert "skipped" in captured.err
        assert "a.png" in captured.err
        assert (tmp_path / "out" / "b.png").exists()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["nothing.png"], "no such file or folder"),
            (["{photo}", "--device", "cuda:99"], "no such GPU"),
            (["{photo}", "--device", "toaster"], "unknown"),
            (["{photo}", "--weights", "nothing"], "no such weight file"),
            (["{photo}", "--weights", "{photo}"], "not a whole safetensors file"),
        ],
    )
    def test_mistakes_are_one_line(
        self,
        photo: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        options: list[str],
        message: str,
    ) -> None:
        arguments = [option.format(photo=photo) for option in options]
        assert main(["reconstruct", *arguments, "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err.strip()
        assert message in error
        assert error.startswith("parscale-ear: ")
        assert "\n" not in error
        assert not (tmp_path / "out").exists()

    def test_originals_are_never_overwritten(
        self, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        own = tmp_path / "a.png"
        own.write_bytes(photo.read_bytes())
        assert main(["reconstruct", str(own), "--out", str(tmp_path)]) == 2
        assert "would overwrite" in capsys.readouterr().err
        assert own.read_bytes() == photo.read_bytes()
        assert main(["reconstruct", str(photo), str(tmp_path / "."), "--out", str(tmp_path)]) == 2
        assert "holds the pictures" in capsys.readouterr().err
        Image.open(photo).save(tmp_path / "b.jpg")
        (tmp_path / "b.png").write_bytes(b"another original")
        assert main(["reconstruct", str(tmp_path / "b.jpg"), "--out", str(tmp_path)]) == 2
        assert "would overwrite" in capsys.readouterr().err
        assert (tmp_path / "b.png").read_bytes() == b"another original"
        (tmp_path / "a_compare.png").write_bytes(photo.read_bytes())
        out = ["--out", str(tmp_path / "out"), "--compare"]
        assert main(["reconstruct", str(tmp_path), *out]) == 2
        assert "comparison" in capsys.readouterr().err

    def test_out_that_is_a_file(self, photo: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["reconstruct", str(photo), "--out", str(photo)]) == 2
        assert "name a folder" in capsys.readouterr().err


class TestTrain:
    def test_mistakes_are_one_line(
        self, folder_of_pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        start = ["train", "autoencoder", "--out", str(tmp_path / "run"), "--images"]
        for options, message in (
            (["nothing"], "no such file or folder"),
            ([str(folder_of_pictures), "--crop", "50"], "crop must be a multiple of 16"),
            ([str(folder_of_pictures), "--minutes", "-1"], "above 0"),
            (
                [str(folder_of_pictures), "--kl-weight", "inf"],
                "kl_weight must be at least 0 and finite",
            ),
            ([""], "a name of pictures is empty"),
            ([str(folder_of_pictures), "--seed", str(2**32)], "below 2^32"),
            ([str(folder_of_pictures), "--start", "nothing"], "no such weight file"),
            ([str(folder_of_pictures), "--adversarial-weight", "-1"], "adversarial_weight must"),
            ([str(folder_of_pictures), "--crop", "512", "--steps", "5"], "none of the"),
        ):
            assert main([*start, *options]) == 2
            error = capsys.readouterr().err.strip().splitlines()[-1]
            assert message in error
            assert error.startswith("parscale-ear: ")
            assert not (tmp_path / "run").exists()

    def test_a_failed_start_can_be_repeated(
        self, folder_of_pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        start = ["train", "autoencoder", "--out", str(tmp_path / "run"), "--device", "cpu"]
        start += ["--stages", "vae", "--steps", "1", "--batch", "1", "--crop", "32", "--images"]
        assert main([*start, str(tmp_path / "nothing")]) == 2
        assert not (tmp_path / "run").exists()
        assert main([*start, str(folder_of_pictures)]) == 0
        assert (tmp_path / "run" / "vae.safetensors").exists()


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys\n"
        "from parscale_ear.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for verb in ("reconstruct", "evaluate", "encode", "decode", "train"):
        assert verb in done.stdout


def test_numbers_that_no_dimension_has_are_refused() -> None:
    assert positive(str(2**31 - 1)) == 2**31 - 1
    with pytest.raises(argparse.ArgumentTypeError, match=r"below 2\^31"):
        positive(str(2**31))


def test_wrong_use_exits_with_2() -> None:
    for arguments in ([], ["paint"], ["reconstruct"], ["train", "autoencoder"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2


@pytest.mark.parametrize(("kernels", "dtype"), [(False, "bf16"), (True, "bf16"), (False, "fp32")])
def test_bf16_without_kernels_for_it_is_done_and_told(
    kernels: bool, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("parscale_ear.device.multiplies_bf16", lambda device: kernels)
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    words = ["--out", str(tmp_path / "out"), "--device", "cpu", "--dtype", dtype]
    assert main(["reconstruct", str(tmp_path / "a.png"), *words]) == 0
    told = "--dtype bf16 is slow on this device" in capsys.readouterr().err
    assert told == (not kernels and dtype == "bf16")


def test_stopped_at_any_moment_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("parscale_ear.cli._parser", interrupted)
    assert main([]) == 130
    assert capsys.readouterr().err == "parscale-ear: stopped\n"


def test_stopped_while_numpy_is_imported_it_says_so() -> None:
    """C code would lose the exception; so the process ends at once."""
    code = (
        "import os, signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's & has it ignored
        "from parscale_ear.verbs.common import stopped_at_once\n"
        "with stopped_at_once():\n"
        "    pass\n"
        "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"  # as under nohup
        "with stopped_at_once():\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "with stopped_at_once():\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    except BaseException:\n"
        "        pass\n"  # as such code does
        "print('went on')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "parscale-ear: stopped\n"


@pytest.mark.skipif(os.name != "posix", reason="SKIPPED: needs a POSIX shell")
def test_works_with_stderr_closed(photo: Path, tmp_path: Path) -> None:
    command = f'exec "{sys.executable}" -m parscale_ear.cli reconstruct "$1" --out "$2" 2>&-'
    words = ["sh", "-c", command, "sh", str(photo), str(tmp_path / "out")]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0
    assert (tmp_path / "out" / "chelsea.png").exists()


def test_a_terminal_without_greek_letters_gets_help() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "parscale_ear.cli", "train", "autoencoder", "--help"],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 0, done.stderr
    assert b"largest ? of noise" in done.stdout


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="SKIPPED: no named pipes here")
def test_a_pipe_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="pipe or a device"):
        check_output(tmp_path / "pipe")
    check_output(tmp_path / "new" / "file.json")


@pytest.mark.parametrize(
    "words",
    [
        ["reconstruct", "{photo}", "--out", "{out}"],
        ["encode", "{photo}", "{out}"],
        ["decode", "nothing", "{out}"],
        ["train", "autoencoder", "--images", "{photo}", "--out", "{out}"],
    ],
)
@pytest.mark.parametrize("name", ["file", "file/folder", "file/a/b"])
def test_where_no_folder_can_be_is_told_before_the_work(
    words: list[str], name: str, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main([word.format(photo=photo, out=tmp_path / name) for word in words]) == 2
    told = "name a folder" if name == "file" else "nothing can be written in"
    assert told in capsys.readouterr().err.splitlines()[-1]


def test_inference_never_imports_training() -> None:
    code = (
        "import sys\n"
        "from parscale_ear import ParScaleEAR\n"
        "import parscale_ear.autoencoder.reconstruct, parscale_ear.metrics.features\n"
        "assert not [m for m in sys.modules if m.startswith('parscale_ear.training')]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


class TestMemory:
    @pytest.mark.parametrize(
        ("error", "told"),
        [
            (MemoryError(), True),
            (torch.OutOfMemoryError("CUDA out of memory"), True),
            (RuntimeError("DefaultCPUAllocator: can't allocate memory"), True),
            (RuntimeError("a fault of ours"), False),
        ],
    )
    def test_too_little_is_told_and_other_faults_are_not_hidden(
        self, error: Exception, told: bool, photo: Path, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        def fail(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(ParScaleEAR, "from_pretrained", fail)
        command = ["reconstruct", str(photo), "--out", str(tmp_path / "out"), "--device", "cpu"]
        if not told:
            with pytest.raises(RuntimeError, match="a fault of ours"):
                main(command)
            return
        assert main(command) == 1
        assert "out of memory; take smaller batches" in capsys.readouterr().err


class TestLatents:
    def test_encode_and_decode(
        self, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        latents, out = str(tmp_path / "latents"), tmp_path / "out"
        assert main(["encode", str(photo), latents, "--side", "64", "--device", "cpu"]) == 0
        line = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert (line["pictures"], line["encoded"], line["dtype"]) == (1, 1, "fp32")
        assert line["images_per_s"] > 0
        assert main(["decode", latents, str(out), "--decoder", "sharp", "--device", "cpu"]) == 0
        assert Image.open(out / "chelsea.png").size == (64, 64)

    def test_several_archives_are_encoded_together(
        self, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        shards = [tmp_path / f"{number}.tar" for number in range(2)]
        for shard in shards:
            with tarfile.open(shard, "w") as archive:
                archive.add(photo, "a.png")
        out = str(tmp_path / "out")
        assert main(["encode", *map(str, shards), out, "--side", "64", "--device", "cpu"]) == 0
        line = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert (line["pictures"], line["complete"]) == (2, True)

    def test_what_is_left_to_other_jobs_is_told(
        self,
        folder_of_pictures: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        command = ["encode", str(folder_of_pictures), str(tmp_path / "out"), "--side", "64"]
        command += ["--shard", "1", "--device", "cpu"]
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", "0")
        assert main(command) == 0
        captured = capsys.readouterr()
        assert "is not finished yet" in captured.err
        assert not json.loads(captured.out.splitlines()[-1])["complete"]
        monkeypatch.setenv("RANK", "one")
        assert main(command) == 2
        assert "RANK=one: expected a whole number" in capsys.readouterr().err
        monkeypatch.setenv("WORLD_SIZE", "")
        monkeypatch.setenv("RANK", "")
        assert main(command) == 0
        captured = capsys.readouterr()
        assert "not finished" not in captured.err
        assert json.loads(captured.out.splitlines()[-1])["complete"]

    def test_damage_is_told_and_counted(
        self, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = tmp_path / "in"
        folder.mkdir()
        (folder / "a.png").write_text("no picture")
        (folder / "b.png").write_bytes(photo.read_bytes())
        arguments = ["encode", str(folder), str(tmp_path / "out"), "--side", "64"]
        assert main([*arguments, "--device", "cpu"]) == 2
        captured = capsys.readouterr()
        assert "skipped in/a.png" in captured.err
        assert json.loads(captured.out.splitlines()[-1])["skipped"] == 1

    def test_one_damaged_picture_does_not_end_the_other_jobs(
        self,
        photo: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        folder = tmp_path / "in"
        folder.mkdir()
        (folder / "a.png").write_text("no picture")
        (folder / "b.png").write_bytes(photo.read_bytes())
        arguments = ["encode", str(folder), str(tmp_path / "out"), "--side", "64", "--shard", "1"]
        monkeypatch.setenv("WORLD_SIZE", "2")
        for rank in ("0", "1"):  # torchrun ends all jobs where one has another exit code than 0
            monkeypatch.setenv("RANK", rank)
            assert main([*arguments, "--device", "cpu"]) == 0
        captured = capsys.readouterr()
        assert "skipped in/a.png" in captured.err
        line = json.loads(captured.out.splitlines()[-1])
        assert (line["pictures"], line["skipped"]) == (1, 1)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["encode", "nothing", "{out}"], "no such file or folder"),
            (["encode", "{photo}", "{out}", "--side", "100"], "side must be a multiple of 16"),
            (["encode", "{photo}", "{photo}"], "is a file; name a folder"),
            (["encode", "{photo}", "{out}", "--weights", "nothing"], "no such weight file"),
            (
                ["encode", "{photo}", "{out}", "--weights", "x", "--decoder", "sharp"],
                "leave it out",
            ),
            (["decode", "nothing", "{out}"], "make it with parscale-ear encode"),
            (["encode", "hf:{out}/nothing", "{out}"], "could not be opened"),
        ],
    )
    def test_mistakes_are_one_line(
        self,
        photo: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
        arguments: list[str],
        message: str,
    ) -> None:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        filled = [a.format(photo=photo, out=tmp_path / "out") for a in arguments]
        assert main(filled) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert lines[-1].startswith("parscale-ear: ")
        assert re.search(message, lines[-1])
        assert not any("Traceback" in line for line in lines)


def test_refinements_bring_pictures_closer_in_every_verb(
    photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures: dict[str, list[float]] = {"reconstruct": [], "evaluate": [], "encode": []}
    model = ParScaleEAR.from_pretrained()
    x = from_uint8(load_squares(find_images([photo]), 64))
    for times in ("0", "1"):
        common = ["--refinements", times, "--device", "cpu"]
        out = tmp_path / times
        assert main(["reconstruct", str(photo), "--out", str(out), *common]) == 0
        mean = re.search(r"mean +([\d.]+) dB", capsys.readouterr().out)
        assert mean is not None
        figures["reconstruct"].append(float(mean[1]))
        measured = ["evaluate", "--images", str(photo), "--side", "64"]
        assert main([*measured, "--features", "efficientnet-lite1", *common]) == 0
        figures["evaluate"].append(json.loads(capsys.readouterr().out.splitlines()[-1])["psnr_db"])
        assert main(["encode", str(photo), str(out / "latents"), "--side", "64", *common]) == 0
        latent = LatentDataset(out / "latents")[0]["latent"]
        with torch.inference_mode():
            restored = model.decode(model.enhance(latent[None]))
        figures["encode"].append(-(restored - x).square().mean().item())
        capsys.readouterr()
    for plain, refined in figures.values():
        assert refined > plain
    with pytest.raises(SystemExit) as stopped:
        main(["reconstruct", str(photo), "--out", str(tmp_path), "--refinements", "-1"])
    assert stopped.value.code == 2
    assert "expected a whole number from 0 to 100, got '-1'" in capsys.readouterr().err


class TestEvaluate:
    def test_figures_and_json(
        self, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        output = tmp_path / "figures.json"
        arguments = ["evaluate", "--images", str(photo), str(photo), "--side", "64"]
        arguments += ["--features", "efficientnet-lite1", "--device", "cpu"]
        assert main([*arguments, "--output", str(output)]) == 0
        printed = capsys.readouterr().out
        line = json.loads(printed.splitlines()[-1])
        assert line == json.loads(output.read_text())
        assert line["pictures"] == 2
        assert f"{line['psnr_db']:.3f} dB" in printed
        assert line["weights"] == "hybrid.safetensors"
        assert main([*arguments, "--decoder", "sharp"]) == 0
        sharp = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert sharp["psnr_db"] < line["psnr_db"]

    def test_a_missing_extractor_is_one_line(
        self, photo: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        arguments = ["evaluate", "--images", str(photo), "--inception-weights", "nothing"]
        assert main([*arguments, "--features", "inception"]) == 2
        assert "no such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "recipe"),
    [
        (train.AUTOENCODER, Recipe),
        (train.VAR, VARRecipe),
        (train.EAR, EARRecipe),
    ],
)
def test_every_number_of_a_recipe_is_an_option(options: dict[str, str], recipe: type[Any]) -> None:
    others = {
        "images", "latents", "validation", "class_names", "minutes", "steps", "start", "stages",
        "precision", "device",
    }  # fmt: skip
    assert {field.name for field in fields(recipe)} - others == set(options)
