"""README's benchmark part is what the figures say, and a figure that changes changes it."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench(monkeypatch):
    """The benchmarks' own modules."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "Testing" / "bench")])
    import measuring
    import report

    return report, measuring


def test_the_readme_says_what_the_figures_say(bench):
    report, _ = bench
    found = report.figures_in(report.FIGURES)
    assert {"peers", "rstn"} <= found.keys()
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    part = report.part_of(found)
    assert part in text, "run `make bench-report`"
    assert report.placed(text, part) == text
    assert report.PLOT.is_file()
    assert report.PLOT.stat().st_size < 150e3


def test_a_changed_figure_changes_the_part(bench):
    report, _ = bench
    found = report.figures_in(report.FIGURES)
    other = copy.deepcopy(found)
    row = next(iter(other["peers"]["comparisons"].values()))
    row["ratios"]["total"] = 123.4
    assert "123.4" in report.part_of(other)
    assert "123.4" not in report.part_of(found)


def test_a_readme_without_the_markers_is_refused(bench):
    report, _ = bench
    with pytest.raises(SystemExit, match="lacks the lines"):
        report.placed("a text", "a part")


def test_a_ratio_is_the_peers_figure_by_ours_round_by_round(bench):
    import peers

    mine = [{"prepare": n, "network": 5.0, "total": 5 + n} for n in (1.0, 2.0, 4.0)]
    others = [{"prepare": 3 * n, "network": 5.0, "total": 5 + 3 * n} for n in (1.0, 2.0, 4.0)]
    row = peers.compared("a peer", {"ours": mine, "peer": others}, agreement=1.0)
    assert row["ratios"]["prepare"] == 3.0
    assert row["ratios"]["all but the network"] == 3.0
    assert row["ratios"]["total"] == pytest.approx(11 / 7)
    assert row["ours"]["prepare"] == {"median": 2.0, "least": 1.0, "most": 4.0}


def test_labels_to_clean_hold_every_structure_and_lie_on_the_peers_grid(bench):
    import peers

    from CTSegLogic.values.grid import Grid

    scan = Grid.of((40, 50, 60), spacing_mm=(1.25, 0.8, 0.8), code="SAR")
    work = peers.corner_aligned(scan)
    assert work.shape == (33, 27, 32)
    assert work.spacing == pytest.approx((1.5, 1.5, 1.5))
    assert np.allclose(work.world((0, 0, 0)), scan.world((0, 0, 0)))
    assert set(np.unique(peers.blobs(work.shape, 7))) == set(range(8))


def test_runs_in_fresh_processes_give_their_last_line_and_tell_of_failures(bench, tmp_path):
    _, measuring = bench
    good, bad = tmp_path / "good.py", tmp_path / "bad.py"
    good.write_text("import sys\nsys.stdout.write('noise\\n{\"a\": 1}\\n')\n", encoding="utf-8")
    bad.write_text("raise SystemExit('no such peer')\n", encoding="utf-8")
    assert measuring.fresh(good, []) == {"a": 1}
    with pytest.raises(SystemExit, match="no such peer"):
        measuring.fresh(bad, [])
