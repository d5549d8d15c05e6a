from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from parscale_ear.cli import main
from parscale_ear.data.reference import wheel_photographs


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
            ([str(folder_of_pictures), "--crop", "512", "--steps", "5"], "none of the"),
        ):
            assert main([*start, *options]) == 2
            error = capsys.readouterr().err.strip().splitlines()[-1]
            assert message in error
            assert error.startswith("parscale-ear: ")

    def test_a_failed_start_can_be_repeated(
        self, folder_of_pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        start = ["train", "autoencoder", "--out", str(tmp_path / "run"), "--images"]
        assert main([*start, str(tmp_path / "nothing")]) == 2
        assert not (tmp_path / "run").exists()


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys\n"
        "from parscale_ear.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "reconstruct" in done.stdout
    assert "train" in done.stdout


def test_wrong_use_exits_with_2() -> None:
    for arguments in ([], ["paint"], ["reconstruct"], ["train", "autoencoder"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2


def test_inference_never_imports_training() -> None:
    code = (
        "import sys\n"
        "from parscale_ear import ParScaleEAR\n"
        "import parscale_ear.autoencoder.reconstruct, parscale_ear.metrics.features\n"
        "assert not [m for m in sys.modules if m.startswith('parscale_ear.training')]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
