"""The commands and snippets of the pages, really run, page by page in their order, on a coarse copy of the
sample scan; what cannot run here is listed with its reason."""

from __future__ import annotations

import re

import numpy as np
import pytest
from dicom_phantoms import Scan
from docs_pages import PAGES, ROOT, blocks, commands, words_of

from CTSegLogic.app.cli import main
from CTSegLogic.files.images import read_image
from CTSegLogic.files.segfile import write_nifti

# What is not run, and why. Every entry must match some command, or the test below says so.
LISTED = {
    r"^Slicer ": "needs the Slicer application; ctseg_batch is run by Testing/modules",
    r"^make ": "sets up an environment; the workflow and CI run them",
    r"^python -m pip install": "changes the environment; the workflow runs it",
    r"--model (vista3d|ctmr)|MRI_BRAIN": "needs published weights that are not shipped",
    r"^ctseg install (totalsegmentator-fast|vista3d)": "needs the network",
    r"^ctseg install efficient-flare": "needs its authors' files",
    r"^ctseg remove": "needs what was installed before",
    r"^ctseg import|liver-model": "needs a folder that nnU-Net trained; test_import writes small ones",
    r"DATASETS|^ctseg (train|prepare)": "needs data sets; test_train and its neighbours write small ones",
    r"cuda:": "needs two GPUs",
    r"^ctseg demo$": "segments the whole sample; `make demo` does it",
}


def reason(line):
    """Why a command is not run, or ""."""
    return next((why for pattern, why in LISTED.items() if re.search(pattern, line)), "")


def test_every_reason_not_to_run_a_command_belongs_to_one():
    lines = [line for _, line in commands()]
    for pattern in LISTED:
        assert any(re.search(pattern, line) for line in lines), f"no command is {pattern}"
    assert sum(not reason(line) for line in lines) > len(lines) / 2, "most commands are to be run"


@pytest.fixture(scope="module")
def a_desk(tmp_path_factory):
    """A folder with the files that the pages name: a scan in three forms, and folders of scans."""
    import SimpleITK

    desk = tmp_path_factory.mktemp("desk")
    whole = read_image(ROOT / "Resources/Samples/average-head-neck-ct.nii.gz", modality="CT")
    scan = whole.on(whole.grid.spaced(5.0), antialias=True)
    voxels = np.rint(scan.array[0]).astype(np.int16)
    (desk / "SCANS").mkdir()
    for name in ("scan.nii.gz", "my_scan.nii.gz", "SCANS/a.nii.gz", "SCANS/b.nii.gz"):
        write_nifti(voxels, scan.grid, desk / name)
    SimpleITK.WriteImage(SimpleITK.ReadImage(str(desk / "scan.nii.gz")), str(desk / "scan.nrrd"))
    (desk / "chosen.txt").write_text("a.nii.gz\n", encoding="utf-8")

    def hu(lps):
        ras = (lps * (-1, -1, 1)).reshape(-1, 3)
        at = (
            np.rint([scan.grid.index(point) for point in ras]).astype(int).clip(0, np.array(voxels.shape) - 1)
        )
        return voxels[tuple(at.T)].reshape(lps.shape[:-1]).astype(np.float64)

    low, high = (
        f(scan.grid.world(np.array([(0, 0, 0), np.array(voxels.shape) - 1])), 0) for f in (np.min, np.max)
    )
    left, back = -high[0], -high[1]
    size = np.ceil((high - low) / 5.0).astype(int)
    for folder in ("DICOM_FOLDER", "DICOM_STUDIES/one"):
        (desk / folder).mkdir(parents=True)
        made = Scan(
            hu=hu,
            count=int(size[2]),
            shape=(int(size[1]), int(size[0])),
            spacing=(5.0, 5.0),
            gap=5.0,
            origin=(float(left), float(back), float(low[2])),
        )
        made.write(desk / folder)
    return desk


RUN = [page for page in PAGES if any(not reason(line) for _, line in commands(page))]


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=lambda p: p.name)
def test_the_commands_of_a_page_run_in_its_order(page, a_desk, an_empty_home, monkeypatch, capsys):
    monkeypatch.chdir(a_desk)
    for left in ("OUT", "out.seg.nrrd", "out.rt.dcm", "out.nii.gz", "out.json", "out.png"):
        rename_away(a_desk / left)
    ran = 0
    for _block, line in commands(page):
        if not reason(line):
            code = main([*words_of(line)[1:]])
            said = capsys.readouterr()
            assert code == 0, f"{line}\n{said.out[-500:]}\n{said.err[-500:]}"
            ran += 1
    assert ran
    for block in blocks("python"):
        if block.page == page and "scan.nii.gz" in block.text:
            exec(compile(block.text, block.name, "exec"), {"__name__": "snippet"})


def rename_away(path):
    """Makes room for a page that begins anew."""
    import shutil

    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
