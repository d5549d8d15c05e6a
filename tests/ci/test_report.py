from __future__ import annotations

import html
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import ci._readme
import ci.report
from ci import _common, _stream_tables
from ci._figures import picture_grid
from ci.validate_results import read_reports

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "docs" / "results"


@pytest.fixture(scope="module")
def kept() -> dict[str, dict[str, Any]]:
    """The committed reports of a full run."""
    reports, problems = read_reports(KEPT)
    assert problems == []
    return reports


@pytest.fixture(scope="module")
def page(kept: dict[str, dict[str, Any]]) -> str:
    return ci.report.build_html(kept, ["something <is> wrong"], torch.device("cpu"))


def test_the_readmes_figures_are_the_committed_ones(kept: dict[str, dict[str, Any]]) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert ci._readme.with_figures(text, kept) == text
    trials = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    assert ci._readme.with_trials(trials) == trials


def test_the_committed_reports_are_of_one_full_run_of_these_weights(
    kept: dict[str, dict[str, Any]],
) -> None:
    assert ci.report.find_problems(kept, weights=_common.weights_digest()) == []
    assert not any(report["quick"] for report in kept.values())


def test_neighbours_are_shown_where_they_are_at_hand(kept: dict[str, dict[str, Any]]) -> None:
    report, device = kept["generation"], torch.device("cpu")
    without = "".join(ci.report._generation(report, device, None))
    shown = "".join(ci.report._generation(report, device, b"the picture"))
    assert "SKIPPED: the training pictures are not at hand" in without
    assert "SKIPPED: the training pictures are not at hand" not in shown
    assert ci._figures.data_url(b"the picture") in shown


def test_a_readme_without_marks(kept: dict[str, dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="lacks the marks"):
        ci._readme.with_figures("# README", kept)


def test_a_quick_or_bad_run_is_not_kept(kept: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(_common.UsageError, match="stale"):
        ci.report.keep(kept, ["stale"], tmp_path)
    quick = {name: {**report, "quick": True} for name, report in kept.items()}
    with pytest.raises(_common.UsageError, match="--quick"):
        ci.report.keep(quick, [], tmp_path)


def test_the_page_is_whole_and_self_contained(page: str, kept: dict[str, dict[str, Any]]) -> None:
    class Checker(HTMLParser):
        open_tags: list[str]
        pictures = 0

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            values = dict(attrs)
            assert not (values.get("src") or "data:").startswith(("http", "/", "file"))
            self.pictures += tag == "img"
            if tag not in ("meta", "img"):
                self.open_tags.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert self.open_tags.pop() == tag

    checker = Checker()
    checker.open_tags = []
    checker.feed(page)
    assert checker.open_tags == []
    evidence = (ci._evidence.TRAINING, ci._evidence.STREAMS)
    assert checker.pictures == 6 + sum(path.exists() for path in evidence)
    assert "something &lt;is&gt; wrong" in page
    assert "UNUSABLE" in page
    for report in kept.values():
        for target in report["targets"]:
            if target["status"] == "SKIPPED":
                assert html.escape(target["why"]) in page


def test_what_streams_are_worth() -> None:
    rows = [{"value": 4.0 - k, "low": 3.9 - k, "high": 4.1 - k} for k in range(2)]
    evidence = {
        "counts": [1, 2], "steps": [0, 1000], "each": rows, "minus_first": rows,
        "slope_per_doubling": rows[1], "slope_from_two_streams": None,
        "model": "VAR", "parameters": {"transformer": 4_500_000}, "images": ["a.tar"],
        "validation": ["b.tar"], "side": 64, "prefix_tokens": 48, "batch": 16, "pictures": 1962,
    }  # fmt: skip
    first, second = _stream_tables.worth_rows(evidence)
    assert first == ("1", "none: nothing to train", "4.0000", "")
    assert second == ("2", "1,000", "3.0000", "+3.0000 [+2.9000, +3.1000]")
    text = _stream_tables.worth_text(evidence)
    assert "4.5 M parameters" in text
    assert "over all: +3.0000 [+2.9000, +3.1000]." in text


def test_the_grid_shows_originals_and_their_differences(tmp_path: Path) -> None:
    path = tmp_path / "grid.png"
    path.write_bytes(picture_grid(torch.device("cpu")))
    pixels = np.asarray(Image.open(path)).astype(float)
    assert pixels.shape == (6 * 260 - 4, 4 * 260 - 4, 3)
    original, faithful, sharp, difference = (
        pixels[:256, 260 * k : 260 * k + 256] for k in range(4)
    )
    expected = np.clip((faithful - original) * 5 + 128, 0, 255)
    np.testing.assert_allclose(difference, expected, atol=1)
    for restored in (faithful, sharp):
        assert 0 < np.abs(restored - original).mean() < 12
    assert not np.array_equal(faithful, sharp)


def test_the_page_in_a_browser(page: str, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("SKIPPED: no chromium on this machine")
    (tmp_path / "report.html").write_text(page, encoding="utf-8")
    shot = tmp_path / "shot.png"
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars "
        "--disable-background-networking --disable-component-update --disable-sync"
    )
    command = [
        browser,
        *flags.split(),
        f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=1200,6000",
        f"--screenshot={shot}",
        (tmp_path / "report.html").as_uri(),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    assert pixels.shape[1] == 1200
    # The picture grid is on the page: a 1:1 copy of its first photograph's colours.
    grid = np.asarray(Image.open(_as_file(page, tmp_path)).convert("RGB")).astype(int)
    patch = grid[100:116, 100:116]
    flat = (pixels == patch[0, 0]).all(axis=-1)
    hits = [
        (y, x)
        for y, x in zip(*np.nonzero(flat[:-16, :-16]), strict=True)
        if np.array_equal(pixels[y : y + 16, x : x + 16], patch)
    ]
    assert hits


def _as_file(page: str, folder: Path) -> Path:
    import base64

    encoded = re.search(r'src="data:image/png;base64,([^"]+)"', page)
    assert encoded is not None
    path = folder / "first.png"
    path.write_bytes(base64.b64decode(encoded[1]))
    return path
