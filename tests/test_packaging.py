"""The files around the package: checksums, version, and how setup_env.sh fails. No network needed."""

import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import parscale_ear
from parscale_ear import checkpoint

ROOT = Path(__file__).resolve().parent.parent


def run_setup(root: Path, *options: str, **env: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the setup_env.sh in `root`, with this Python unless `env` names another."""
    env = {"PYTHON": sys.executable, **env}
    return subprocess.run(
        ["bash", str(root / "setup_env.sh"), *options],
        env={**os.environ, **{name: str(value) for name, value in env.items()}},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


def covered_by_checksums(root: Path) -> list[str]:
    """What SHA256SUMS has to list, found without the script's help."""
    paths = [root / "poetry.lock", root / "pyproject.toml"]
    for folder in ("ci", "parscale_ear/weights"):
        paths += [
            path
            for path in (root / folder).rglob("*")
            if path.is_file()
            and not path.name.startswith(".")
            and path.suffix not in {".pyc", ".part"}
        ]
    return sorted(path.relative_to(root).as_posix() for path in paths)


def read_checksums(root: Path) -> dict[str, str]:
    """SHA256SUMS as {path: digest}, in the order of the file."""
    lines = (root / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    return {path: digest for digest, path in (line.split("  ", 1) for line in lines)}


def executable(path: Path, script: str) -> Path:
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A small checkout with the real setup_env.sh, to write to and to break."""
    root = tmp_path / "a check out"  # the space is on purpose
    (root / "ci" / "__pycache__").mkdir(parents=True)
    (root / "parscale_ear" / "weights").mkdir(parents=True)
    for name in ("setup_env.sh", "pyproject.toml", "poetry.lock"):
        shutil.copy(ROOT / name, root)
    (root / "ci" / "run.sh").write_text("true\n", encoding="utf-8")
    (root / "ci" / "__pycache__" / "run.cpython-311.pyc").write_bytes(b"no")
    (root / "parscale_ear" / "weights" / "b.safetensors").write_bytes(b"weights")
    (root / "parscale_ear" / "weights" / "c.safetensors.part").write_bytes(b"half")
    (root / "parscale_ear" / "weights" / "README.md").write_text("two words\n", encoding="utf-8")
    return root


class TestChecksums:
    def test_list_is_exactly_what_it_should_cover(self) -> None:
        listed = list(read_checksums(ROOT))
        assert listed == covered_by_checksums(ROOT), "run: bash setup_env.sh --write-checksums"

    def test_every_file_matches(self) -> None:
        stale = [
            path
            for path, digest in read_checksums(ROOT).items()
            if hashlib.sha256((ROOT / path).read_bytes()).hexdigest() != digest
        ]
        assert not stale, "run: bash setup_env.sh --write-checksums"

    def test_written_list_covers_the_same_and_nothing_else(self, checkout: Path) -> None:
        done = run_setup(checkout, "--write-checksums")
        assert (done.returncode, done.stderr) == (0, "")
        assert list(read_checksums(checkout)) == covered_by_checksums(checkout)
        assert "ci/run.sh" in read_checksums(checkout)
        assert not (checkout / ".venv").exists()


class TestLock:
    def test_what_the_lock_does_not_have_is_found(self, tmp_path: Path) -> None:
        script = (ROOT / "setup_env.sh").read_text(encoding="utf-8")
        function = re.search(r"^beyond_the_lock\(\) \{.*?^\}$", script, re.MULTILINE | re.DOTALL)
        assert function is not None
        installed = {d.metadata["Name"] for d in importlib.metadata.distributions()}
        requirements = tmp_path / "requirements.txt"
        lines = [f"{name}==1.0 ; python_version\n    --hash=sha256:0\n" for name in installed]

        def found(kept: list[str]) -> list[str]:
            requirements.write_text("".join(kept), encoding="utf-8")
            command = f'venv={sys.prefix!r}; {function[0]}\nbeyond_the_lock "{requirements}"'
            return subprocess.check_output(["bash", "-c", command], text=True).split()

        assert found(lines) == []
        assert found([line for line in lines if not line.startswith("pytest==")]) == ["pytest"]


class TestVersion:
    def test_pyproject_and_package_agree(self) -> None:
        # A regular expression: tomllib is missing from Python 3.10.
        text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        found = re.search(r'^version = "(.+?)"', text, flags=re.MULTILINE)
        assert found is not None
        assert found.group(1) == parscale_ear.__version__


class TestSetupFailures:
    """Each failure is one line on stderr, with the remedy, and nothing half-made that matters."""

    @staticmethod
    def the_line(done: subprocess.CompletedProcess[str], status: int) -> str:
        assert done.returncode == status, done.stdout + done.stderr
        lines = done.stderr.splitlines()
        assert len(lines) == 1, done.stderr
        assert lines[0].startswith("setup_env: ")
        return lines[0]

    @pytest.mark.parametrize("options", [["--tset"], ["extra"], ["--test", "extra"]])
    def test_unknown_option(self, checkout: Path, options: list[str]) -> None:
        assert "--help" in self.the_line(run_setup(checkout, *options), 2)

    def test_help(self, checkout: Path) -> None:
        done = run_setup(checkout, "--help")
        assert (done.returncode, done.stderr) == (0, "")
        for word in ("--test", "--write-checksums", "PYTHON="):
            assert word in done.stdout

    @pytest.mark.parametrize("version", ["3.9.18", "3.14.0", "2.7.18"])
    def test_wrong_python(self, checkout: Path, version: str) -> None:
        fake = executable(checkout / "python", f"echo {version} /usr/bin/python")
        line = self.the_line(run_setup(checkout, PYTHON=fake), 2)
        assert "Python 3.10 to 3.13 is needed" in line
        assert f"found {version}" in line
        assert not (checkout / ".venv").exists()

    @pytest.mark.parametrize("script", ["exit 127", "true", "echo"])
    def test_python_that_does_not_run(self, checkout: Path, script: str) -> None:
        fake = executable(checkout / "python", script)
        assert "none that runs" in self.the_line(run_setup(checkout, PYTHON=fake), 2)

    def test_full_disk(self, checkout: Path, tmp_path: Path) -> None:
        (tmp_path / "bin").mkdir()
        table = "Filesystem 1024-blocks Used Available Capacity Mounted\n/dev/x 9 9 5242880 99% /"
        executable(tmp_path / "bin" / "df", f"printf '%s\\n' '{table}'")
        done = run_setup(checkout, PATH=f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
        assert "5 GB free" in self.the_line(done, 2)
        assert not (checkout / ".venv").exists()

    def test_foreign_venv_is_not_touched(self, checkout: Path) -> None:
        (checkout / ".venv").mkdir()
        (checkout / ".venv" / "mine").touch()
        assert ".venv was not made by this script" in self.the_line(run_setup(checkout), 2)
        assert (checkout / ".venv" / "mine").exists()

    @pytest.mark.slow  # makes an environment twice
    def test_no_package_index_then_repair(self, checkout: Path) -> None:
        log = checkout.resolve() / ".venv" / "setup.log"
        for attempt in range(2):
            # An index that offers nothing: pip fails at once, as it does with no network.
            done = run_setup(checkout, PIP_NO_INDEX="1", PIP_FIND_LINKS=checkout)
            line = self.the_line(done, 1)
            assert "installing Poetry" in line
            assert line.endswith(f"details: {log}")
            assert log.is_file()
            assert "Traceback" not in done.stdout
            assert not (checkout / ".venv" / "state").exists()
            assert ("replacing .venv (unfinished" in done.stdout) == (attempt == 1)


def test_no_header_names_a_path_of_the_machine_that_made_it() -> None:
    for path in sorted((ROOT / "parscale_ear" / "weights").glob("*.safetensors")):
        header = checkpoint.load(path)[1]
        assert not re.search(r'"(/|[A-Za-z]:\\\\|~)[^"]*"', json.dumps(header)), path.name


def test_public_names_can_be_looked_up() -> None:
    """In a fresh process, where none was imported yet."""
    program = (
        "import parscale_ear as p; print(set(p.__all__) <= set(dir(p)), p.HybridConfig.__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["True", "HybridConfig"]
