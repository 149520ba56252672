"""The bench of batches on phantoms: killed twice and resumed, a batch leaves what a calm one does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import phantoms
import pytest

from CTSegLogic.files.segfile import write_nifti

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_a_batch_killed_twice_and_resumed_is_that_of_a_calm_run(tmp_path, a_tiny_card):
    (tmp_path / "in").mkdir()
    scan = phantoms.ct_of(phantoms.tilted_grid((48, 56, 56), (3, 2.5, 2.5)), noise=8)
    for n in range(12):
        write_nifti(scan.array[0] + n, scan.grid, tmp_path / "in" / f"c{n}.nii.gz")
    command = [sys.executable, str(ROOT / "Testing" / "bench" / "batch.py"), "--data", str(tmp_path / "in")]
    command += ["--count", "12", "--timed", "2", "--model", str(a_tiny_card.folder)]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "bench.json")], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    table = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    proof = table["proof"]
    assert (proof["kills"], proof["done"], proof["written_again"], proof["differences"]) == (2, 12, 0, [])
    assert 4 <= proof["done_at_kill"][0] < 12
    assert 8 <= proof["done_at_kill"][1] < 12
    assert [row["way"] for row in table["ways"]] == ["loop", "one worker", "two workers"]
    for row in table["ways"]:
        assert sum(row["shares"].values()) == pytest.approx(1)
        assert min(row["busy_s"].values()) > 0
    assert "Two workers over one" in done.stdout
