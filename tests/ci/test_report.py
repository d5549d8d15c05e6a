from __future__ import annotations

import copy
import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import ci._evidence
import ci._figures_page
import ci._readme
import ci.report
import ci.validate_results
from ci import _common, _stream_tables
from ci._figures import picture_grid, worth_plot
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
    assert ci._readme.with_summary(text, kept) == text
    figures = (ROOT / "docs" / "figures.md").read_text(encoding="utf-8")
    assert ci._readme.with_figures(figures, kept) == figures
    trials = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    assert ci._readme.with_trials(trials) == trials


def test_the_contents_of_the_figures_lead_to_every_section(kept: dict[str, dict[str, Any]]) -> None:
    page = ci._figures_page.all_figures(kept)
    links = re.findall(r"^- \[(.+)\]\(#(.+)\)$", page, re.MULTILINE)
    assert [title for title, _ in links] == re.findall(r"^## (.+)$", page, re.MULTILINE)
    assert len({anchor for _, anchor in links}) == len(links)
    assert dict(links)["Parallel streams: VAR"] == "parallel-streams-var"


def test_every_section_of_the_figures_says_where_it_is_from(
    kept: dict[str, dict[str, Any]],
) -> None:
    sections = re.split(r"^## ", ci._figures_page.all_figures(kept), flags=re.MULTILINE)[1:]
    measured = r"torch \d|the model card beside|imagenette128-val.tar|seed \d+, by \d"
    for section in sections:
        title = section.splitlines()[0]
        if title != "Milestones":  # those are of the sections above
            assert re.search(measured, section), title


@pytest.mark.parametrize("name", ci._readme.PICTURES)
def test_the_readmes_pictures_are_those_of_the_shipped_weights(name: str, tmp_path: Path) -> None:
    assert f"](docs/pictures/{name})" in (ROOT / "README.md").read_text(encoding="utf-8")
    (tmp_path / name).write_bytes(ci._readme.PICTURES[name](torch.device("cpu")))
    made, shown = (
        np.asarray(Image.open(path)).astype(int)
        for path in (tmp_path / name, ci._readme.PICTURE_FOLDER / name)
    )
    # Another CPU rounds otherwise: levels of 255.
    assert np.abs(made - shown).mean() < 0.2


def test_the_readme_names_all_that_did_not_pass(kept: dict[str, dict[str, Any]]) -> None:
    text = ci._readme.summary(kept)
    for report in kept.values():
        for target in report["targets"]:
            assert (f"| {target['name']} |" in text) == (target["status"] != "PASS")
    assert "on a GPU | **not measured yet**" in text
    on_cuda = {**kept, "latency": {**kept["latency"], "device_type": "cuda"}}
    assert "not measured yet" not in ci._readme.summary(on_cuda)


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
    with pytest.raises(ValueError, match="the README lacks the marks"):
        ci._readme.with_summary("# README", kept)
    with pytest.raises(ValueError, match=r"docs/figures.md lacks the marks"):
        ci._readme.with_figures("# Figures", kept)


def test_a_quick_or_bad_run_is_not_kept(kept: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(_common.UsageError, match="stale"):
        ci.report.keep(kept, ["stale"], tmp_path)
    quick = {name: {**report, "quick": True} for name, report in kept.items()}
    with pytest.raises(_common.UsageError, match="--quick"):
        ci.report.keep(quick, [], tmp_path)
    few = {name: {**report} for name, report in kept.items()}
    few["latency"]["settings"] = {**few["latency"]["settings"], "num_runs": 99}
    with pytest.raises(_common.UsageError, match=r"a full run \(latency: num_runs 99 of 100\)"):
        ci.report.keep(few, [], tmp_path)
    shown = ci.report.build_html(few, [], torch.device("cpu"))
    assert "other than a full run: latency: num_runs 99 of 100" in shown


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["streams"]["figures"].update(model="VAR-d2"), "streams: untrained VAR-d2"),
        (lambda r: r["streams"]["figures"].update(trained=True), "streams: trained VAR-d16"),
        (lambda r: r["streams"]["settings"].update(counts=[1, 4]), "streams: without P = 2"),
        (lambda r: r["generation"]["figures"]["settings"].update(guidance=9.0), "guidance 9"),
        (lambda r: r["latency"].update(dtype="bfloat16"), "latency: in bfloat16"),
        (lambda r: r["fid"].update(seed=3), "fid: seed 3"),
        (lambda r: r["sanity"]["packages"].update(piq="0.1"), "piq 0.1 instead of"),
        (lambda r: r["sanity"].update(torch="2.6.0+cpu"), r"torch 2.6.0 instead of"),
        (lambda r: r["fid"].update(run="another"), "not all by one bash ci/run.sh"),
        (lambda r: [report.pop("run") for report in r.values()], "not all by one bash ci/run.sh"),
        (lambda r: r.pop("sanity"), "sanity: missing"),
        (lambda r: r["streams"]["settings"].update(guidance=0.0), "guidance 0 instead of 1.5"),
        (lambda r: r["streams"]["settings"].update(label=7), "label 7 instead of 3"),
        (lambda r: r["fid"]["figures"].update(distance_name="FD-EfficientNetLite0"), "Lite0"),
        (
            lambda r: r["ablation"]["figures"]["reference"].update(source="280 pictures of mine"),
            "ablation: on 280 pictures of mine",
        ),
    ],
)
def test_a_run_with_other_settings_is_not_kept(
    change: Callable[[dict[str, Any]], None], message: str, kept: dict[str, dict[str, Any]],
    tmp_path: Path,
) -> None:  # fmt: skip
    assert ci.validate_results.unlike_full(kept) == []
    other = copy.deepcopy(kept)
    change(other)
    with pytest.raises(_common.UsageError, match=message):
        ci.report.keep(other, [], tmp_path)


def test_documents_are_not_written_from_reports_of_other_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(KEPT, tmp_path / "results")
    path = tmp_path / "results" / "fid.json"
    report = json.loads(path.read_text())
    report["weights_sha256"]["hybrid"] = "0" * 64
    path.write_text(json.dumps(report))
    monkeypatch.setattr(ci.report, "KEPT", tmp_path / "results")
    monkeypatch.setattr(ci.report, "write_documents", lambda reports: pytest.fail("written"))
    with pytest.raises(_common.UsageError, match=r"not written: .*other weights"):
        ci.report.main(["--readme", "--results", str(tmp_path / "none")])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r.update(run="another"), "not all by one bash"),
        (lambda r: r.update(evidence_sha256="0"), "beside other evidence"),
    ],
)
def test_documents_are_written_from_one_full_run_beside_its_evidence(
    change: Callable[[dict[str, Any]], None], said: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    shutil.copytree(KEPT, tmp_path / "results")
    path = tmp_path / "results" / "fid.json"
    report = json.loads(path.read_text())
    change(report)
    path.write_text(json.dumps(report))
    monkeypatch.setattr(ci.report, "KEPT", tmp_path / "results")
    monkeypatch.setattr(ci.report, "write_documents", lambda reports: pytest.fail("written"))
    with pytest.raises(_common.UsageError, match=f"not written: .*{said}"):
        ci.report.main(["--readme", "--results", str(tmp_path / "none")])


def test_a_judgement_of_other_weights_is_nowhere_shown(
    kept: dict[str, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = json.loads((KEPT / "generation_judged.json").read_text())
    shown = f"{record['class_accuracy']['value']:.1%} in their own class"
    assert shown in ci._readme.summary(kept)
    path = tmp_path / "generation_judged.json"
    path.write_text(json.dumps({**record, "weights_sha256": "0"}))
    monkeypatch.setattr(ci._evidence, "JUDGED", path)
    why = "SKIPPED: the judgement on record is of other weights"
    readme, figures = ci._readme.summary(kept), ci._figures_page.all_figures(kept)
    page = "".join(ci.report._generation(kept["generation"], torch.device("cpu"), None))
    assert shown not in readme
    assert all(why in text for text in (readme, figures, page))


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
    drawn_together = 2 * ci._evidence.EAR_STREAMS.exists()
    assert checker.pictures == 6 + sum(path.exists() for path in evidence) + drawn_together
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


def _row(value: float, off: float) -> dict[str, float]:
    return {"value": value, "low": value - off, "high": value + off}


@pytest.mark.parametrize(
    ("score", "distance", "words"),
    [
        (-0.1, -3.0, "the energy score is lower by 0.1000 and the FD-x is lower by 3.0"),
        (0.1, 3.0, "the energy score is higher by 0.1000 and the FD-x is higher by 3.0"),
        (-0.01, 1.0, "energy score cannot be told from one stream's and the FD-x cannot be told"),
    ],
)
def test_the_verdict_on_streams_is_what_the_intervals_say(
    score: float, distance: float, words: str
) -> None:
    evidence = {
        "counts": [1, 2], "steps": [500, 500], "each": [_row(8, 0.1), _row(8 + score, 0.1)],
        "minus_first": [_row(0, 0), _row(score, 0.05)], "slope_per_doubling": _row(score, 0.05),
        "distance_slope_per_doubling": _row(distance, 2), "distance_name": "FD-x", "judge": "X",
        "judged": [
            {"distance": _row(90 + d, 2), "distance_minus_first": _row(d, 2),
             "class_accuracy": _row(0.5, 0)} for d in (0, distance)
        ],
        "model": "EnergyAR", "parameters": {"total": 6_700_000}, "backbone": "frozen", "batch": 64,
        "prefix_tokens": 16, "pictures": 100, "judged_pictures": 2000,
        "settings": {"guidance": 1.0, "temperature": 0.9}, "version": "0.1", "data": ["x.tar"],
        "torch": "2",
    }  # fmt: skip
    costs = [
        {"streams": 1, "median_s": 0.05, "cache_bytes": 2**20, "loaded_bytes": 2**29,
         "peak_bytes": 2**29 + 30 * 2**20},
        {"streams": 2, "median_s": 0.075, "cache_bytes": 3 * 2**20, "loaded_bytes": None,
         "peak_bytes": None},
    ]  # fmt: skip
    figures = {"trained_model": {"aggregate": costs, "settings": {"guidance": 2.0}}}
    report = {
        "figures": figures, "device": "A CPU", "threads": 2, "dtype": "bfloat16", "torch": "2",
        "date": "2026-11-29T00:00:00", "settings": {"num_runs": 4},
    }  # fmt: skip
    text = _stream_tables.ear_worth_text(evidence, report)
    assert words in text
    assert "1.5 times the time and 3.0 times the cache" in text
    assert "of the same size, guidance 2; A CPU, 2 threads, float32, 4 rounds in turn" in text
    assert "was not measured in this run" in _stream_tables.ear_worth_text(evidence, None)
    first, second = _stream_tables.ear_worth_rows(evidence, figures)
    assert (first[3], first[5]) == ("", "")
    assert second[4] == f"{90 + distance:.1f} [{88 + distance:.1f}, {92 + distance:.1f}]"
    assert first[-1] == "30.0"
    assert second[-3:] == ("0.075", "3.00", "")
    assert len(second) == len(_stream_tables.ear_worth_head(evidence))


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


def test_an_interval_that_does_not_hold_its_figure_is_not_drawn() -> None:
    row = {"value": 1.0, "low": 0.5, "high": 2.0}
    assert worth_plot((2,), [row], "distance").startswith(b"\x89PNG")
    for end in ("low", "high"):
        with pytest.raises(ValueError, match="negative"):
            worth_plot((2,), [{**row, end: 1.5 if end == "low" else 0.7}], "distance")
