"""The commands and snippets of the pages, really run, page by page in their order, on a part of the sample
scan; what cannot run here is listed with its reason."""

from __future__ import annotations

import re
import shutil

import numpy as np
import pytest
from dicom_phantoms import Scan
from docs_pages import PAGES, ROOT, blocks, commands, words_of

from CTSegLogic.app.cli import main
from CTSegLogic.files.images import read_image
from CTSegLogic.files.segfile import write_nifti
from CTSegLogic.values.grid import Box

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
    r"rstn-parotid": "needs a model that a recipe on the page trains",
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
    # Skull base to neck: one tile of the starter.
    around = Box(start_kji=(45, 8, 48), stop_kji=(109, 72, 112))
    scan = whole.on(whole.grid.oriented("SPL").cropped(around))
    voxels = np.rint(scan.array[0]).astype(np.int16)
    (desk / "SCANS").mkdir()
    for name in ("scan.nii.gz", "my_scan.nii.gz", "SCANS/a.nii.gz", "SCANS/b.nii.gz"):
        write_nifti(voxels, scan.grid, desk / name)
    SimpleITK.WriteImage(SimpleITK.ReadImage(str(desk / "scan.nii.gz")), str(desk / "scan.nrrd"))
    (desk / "chosen.txt").write_text("a.nii.gz\n", encoding="utf-8")

    back = np.linalg.inv(scan.grid.affine)

    def hu(lps):
        at = np.rint((lps * (-1, -1, 1)) @ back[:3, :3].T + back[:3, 3]).astype(int)
        return voxels[tuple(np.moveaxis(at.clip(0, 63), -1, 0))].astype(np.float64)

    right, front, low = scan.grid.world((0, 0, 0))
    for folder in ("DICOM_FOLDER", "DICOM_STUDIES/one"):
        (desk / folder).mkdir(parents=True)
        made = Scan(
            hu=hu,
            count=64,
            shape=(64, 64),
            spacing=(3.0, 3.0),
            gap=3.0,
            origin=(-right, -front, low),
        )
        made.write(desk / folder)
    return desk


RUN = [page for page in PAGES if any(not reason(line) for _, line in commands(page))]


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=lambda p: p.name)
def test_the_commands_of_a_page_run_in_its_order(page, a_desk, an_empty_home, monkeypatch, capsys):
    monkeypatch.chdir(a_desk)
    make_room(a_desk)
    for _block, line in commands(page):
        if page.name == "README.md":  # its lines stand for themselves, and write to the same names
            make_room(a_desk)
        if not reason(line):
            code = main([*words_of(line)[1:]])
            said = capsys.readouterr()
            assert code == 0, f"{line}\n{said.out[-500:]}\n{said.err[-500:]}"
    for block in blocks("python"):
        if block.page == page and "scan.nii.gz" in block.text:
            make_room(a_desk)
            exec(compile(block.text, block.name, "exec"), {"__name__": "snippet"})


def make_room(desk):
    """Removes what a page before this one wrote under names that this one uses, too."""
    shutil.rmtree(desk / "OUT", ignore_errors=True)
    for path in desk.glob("out.*"):
        path.unlink()
