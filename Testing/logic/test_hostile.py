"""One test for each fault that fuzzing found: crashes of ITK, raw errors, memory, files elsewhere."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import struct
import zipfile
import zlib
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from dicom_phantoms import Scan, ramp, save

from CTSegLogic.app.scans import find_scans
from CTSegLogic.app.worker import Worker
from CTSegLogic.files.archive import unpack
from CTSegLogic.files.contours import filled
from CTSegLogic.files.features import FeatureFolder
from CTSegLogic.files.images import read_image
from CTSegLogic.files.points import read_points
from CTSegLogic.files.rtstruct import is_rtstruct
from CTSegLogic.files.segfile import read_segmentation
from CTSegLogic.files.unpickled import read_pickled
from CTSegLogic.files.wire import read_job, read_result
from CTSegLogic.systems.tensors import read_checkpoint
from CTSegLogic.train.grow import read_task, task_of
from CTSegLogic.values.card import card_from
from CTSegLogic.values.errors import (
    CardInvalid,
    CTSegError,
    ImageInvalid,
    PromptUnknown,
    TaskInvalid,
    WeightsCorrupt,
)
from CTSegLogic.values.grid import Grid
from CTSegLogic.values.language import understand
from CTSegLogic.values.run import Run

VOXELS = np.arange(120, dtype=np.int16).reshape(4, 5, 6)
META = (
    "ObjectType = Image\nNDims = 3\nBinaryData = True\nDimSize = 6 5 4\nElementSpacing = 1 1 1\n"
    "ElementType = MET_SHORT\nElementDataFile = LOCAL\n"
)
NRRD = (
    "NRRD0004\ntype: short\ndimension: 3\nspace: left-posterior-superior\nsizes: 6 5 4\n"
    "space directions: (1,0,0) (0,1,0) (0,0,1)\nendian: little\nencoding: raw\nspace origin: (0,0,0)\n"
)
DEEP = "[" * 100_000


def nifti(**fields) -> bytes:
    image = nibabel.Nifti1Image(VOXELS.T, np.eye(4))
    raw = bytearray(image.to_bytes())
    header = np.frombuffer(raw, nibabel.Nifti1Header.template_dtype, count=1)
    for name, value in fields.items():
        header[name] = value
    return bytes(raw)


def written(path: Path, data: bytes | str) -> Path:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def refusal(path: Path) -> str:
    with pytest.raises(ImageInvalid) as caught:
        read_image(path)
    assert caught.value.seen.isprintable()
    return caught.value.seen


@pytest.mark.parametrize(
    ("fields", "says"),
    {
        "no offset": ({"vox_offset": np.inf}, "begin at byte inf"),
        "negative": ({"dim": [3, 6, -5, 4, 1, 1, 1, 1]}, "6 x -5 x 4"),
        "30000 cubed": ({"dim": [3, 30000, 30000, 30000, 1, 1, 1, 1]}, "more than any scan"),
        "overflow": ({"dim": [7, 32767, 32767, 32767, 32767, 32767, 32767, 32767]}, "more than any scan"),
        "too few bytes": ({"dim": [3, 600, 500, 400, 1, 1, 1, 1]}, "ends before its last voxel"),
        "unknown type": ({"datatype": 4096}, "type 4096"),
    }.values(),
)
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_a_nifti_header_that_claims_too_much_is_refused(tmp_path, fields, says, ending):
    raw = nifti(**fields)
    assert says in refusal(written(tmp_path / f"x{ending}", gzip.compress(raw) if "gz" in ending else raw))


def test_an_unknown_unit_is_taken_for_millimetres(tmp_path):
    assert read_image(written(tmp_path / "x.nii", nifti(xyzt_units=255))).grid.spacing == (1.0, 1.0, 1.0)


def test_a_header_cut_short_is_refused(tmp_path):
    head = nibabel.Nifti2Image(VOXELS.T, np.eye(4)).to_bytes()[:400]
    assert "not a readable NIfTI" in refusal(written(tmp_path / "x.nii", head))


def test_what_follows_the_last_voxel_takes_no_memory(tmp_path):
    import tracemalloc

    path = written(tmp_path / "x.nii.gz", gzip.compress(nifti() + bytes(100 << 20), 1))
    tracemalloc.start()
    volume = read_image(path)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(volume.array[0], VOXELS)
    assert most < 30 << 20


def test_a_gzip_of_several_members_is_read_whole(tmp_path):
    raw = nifti()
    parts = [gzip.compress(raw[a:b]) for a, b in ((0, 100), (100, 400), (400, None))]
    volume = read_image(written(tmp_path / "x.nii.gz", b"".join(parts) + bytes(20)))
    assert np.array_equal(volume.array[0], VOXELS)


def test_a_wrong_checksum_is_seen(tmp_path):
    packed = bytearray(gzip.compress(nifti()))
    packed[-8] ^= 1
    assert "damaged or cut off" in refusal(written(tmp_path / "x.nii.gz", bytes(packed)))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("NDims = 3", "NDims = -1e308"),  # ITK crashed
        ("NDims = 3", "NDims = 2147483648"),  # ITK aborted
        ("DimSize = 6 5 4", "DimSize = 30000 30000 30000"),
        ("DimSize = 6 5 4", "DimSize = 6 5 -4"),
        ("DimSize = 6 5 4", "DimSize = 6 5 400"),
        ("ElementSpacing = 1 1 1", "ElementSpacing = 1 nan 1"),
        ("BinaryData = True", "HeaderSize = 99999999999"),
        ("BinaryData = True", "Comment = " + "x" * 100_000),
        ("LOCAL", "%s%s%s%s %s"),  # ITK crashed
        ("LOCAL", "/etc/passwd"),
        ("LOCAL", "../canary.raw"),
        ("LOCAL", "LIST\n../canary.raw"),
        ("LOCAL", "/dev/zero"),
        ("LOCAL", "nul"),
    ],
)
def test_a_meta_header_that_itk_would_trust_is_refused(tmp_path, old, new):
    (tmp_path / "in").mkdir()
    written(tmp_path / "canary.raw", bytes(5000))
    good = META.encode() + VOXELS.tobytes()
    assert read_image(written(tmp_path / "in" / "x.mha", good)).array.shape == (1, 4, 5, 6)
    refusal(written(tmp_path / "in" / "y.mhd", META.replace(old, new).encode() + VOXELS.tobytes()))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("endian: little", "x" * 3000),  # ITK crashed
        ("sizes: 6 5 4", "sizes: 30000 30000 30000"),
        ("sizes: 6 5 4", "sizes: 6 5 -4"),
        ("sizes: 6 5 4", "sizes: 6 5 9223372036854775807"),
        ("(0,1,0)", "(0,nan,0)"),
        ("space origin: (0,0,0)", "space origin: (0,inf,0)"),
        ("endian: little", "data file: /etc/passwd"),
        ("endian: little", "data file: ../canary.raw"),
        ("endian: little", "data file: v%03d.raw 0 1000000000 1"),
        ("dimension: 3", "dimension: 3\ndimension: 4"),
    ],
)
def test_an_nrrd_header_that_itk_would_trust_is_refused(tmp_path, old, new):
    (tmp_path / "in").mkdir()
    written(tmp_path / "canary.raw", bytes(5000))
    good = NRRD.encode() + b"\n" + VOXELS.tobytes()
    assert read_image(written(tmp_path / "in" / "x.nrrd", good)).array.shape == (1, 4, 5, 6)
    refusal(written(tmp_path / "in" / "y.nrrd", NRRD.replace(old, new).encode() + b"\n" + VOXELS.tobytes()))


def test_detached_voxels_beside_the_header_are_read(tmp_path):
    written(tmp_path / "v.raw", VOXELS.tobytes())
    head = written(tmp_path / "x.nhdr", NRRD + "data file: v.raw\n")
    other = written(tmp_path / "x.mhd", META.replace("LOCAL", "v.raw"))
    assert np.array_equal(read_image(head).array, read_image(other).array)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_no_image(tmp_path):
    os.mkfifo(tmp_path / "x.nii")
    assert "is no file" in refusal(tmp_path / "x.nii")


def test_a_message_is_one_plain_line():
    error = ImageInvalid(seen="a\n\x1b[2Jb" + "x" * 5000, hint="c\td")
    assert error.seen.isprintable()
    assert len(error.seen) <= 2000
    assert error.hint == "c d"


@pytest.mark.parametrize(
    "tags",
    [
        {"Rows": [24, 24]},
        {"Modality": ["CT", "CT"]},
        {"BitsAllocated": [16, 16]},
        {"Rows": 20000, "Columns": 20000},
    ],
)
def test_dicom_headers_that_say_too_much_are_refused(tmp_path, tags):
    scan = Scan(hu=ramp, count=3)
    for k in range(3):
        data = scan.dataset(k)
        for keyword, value in tags.items():
            data[keyword].value = value
        save(data, tmp_path / f"{k}.dcm")
    refusal(tmp_path)


def test_a_deflated_bomb_is_not_unpacked(tmp_path):
    data = Scan(hu=ramp, count=3).dataset(0)
    meta = data.file_meta
    meta.TransferSyntaxUID = "1.2.840.10008.1.2.1.99"
    file = io.BytesIO()
    file.write(bytes(128) + b"DICM")
    pydicom.filewriter.write_file_meta_info(pydicom.filebase.DicomFileLike(file), meta)
    packer = zlib.compressobj(1, zlib.DEFLATED, -15)
    piece = bytes(8 << 20)
    body = b"".join(packer.compress(piece) for _ in range(33)) + packer.flush()
    path = written(tmp_path / "x.dcm", file.getvalue() + body)
    assert "unpacks to more" in refusal(path)
    assert not is_rtstruct(path)


def test_contours_far_outside_the_grid_take_no_memory():
    grid = Grid.of((4, 10, 12), spacing_mm=(3, 1, 1))
    far = np.array([[-1e5, -1e5, 3.0], [1e5, -1e5, 3.0], [1e5, 1e5, 3.0], [-1e5, 1e5, 3.0]])
    mask = filled([far], grid)
    assert mask[1].all()
    assert not mask[[0, 2, 3]].any()
    turn = np.array([[1, 0, 0], [0, np.cos(0.3), -np.sin(0.3)], [0, np.sin(0.3), np.cos(0.3)]])
    assert filled([far @ turn.T], grid).any()


@pytest.mark.parametrize(
    "text", ['{"positive": [[1' + "0" * 400 + ", 2, 3]]}", DEEP, '{"markups": {}}', "[]"]
)
def test_clicks_that_are_none_are_refused(tmp_path, text):
    with pytest.raises(PromptUnknown):
        read_points(written(tmp_path / "p.json", text))


def test_a_legend_of_another_kind_is_refused(tmp_path):
    image = written(tmp_path / "a.nii.gz", gzip.compress(nifti()))
    for text in ('{"labels": [1]}', '{"labels": "x"}', DEEP):
        written(tmp_path / "a.json", text)
        with pytest.raises(ImageInvalid, match="not a legend"):
            read_segmentation(image)


def test_a_list_with_impossible_lines_keeps_its_other_scans(tmp_path):
    written(tmp_path / "a.nii.gz", gzip.compress(nifti()))
    long, wide = "x" * 5000, '"' + "y" * 140_000
    listed = written(tmp_path / "list.csv", f"a.nii.gz\n{long}\n\0\n{wide}\n")
    scans = find_scans(tmp_path, listed)
    assert [scan.name for scan in scans if not scan.fault] == ["a.nii.gz"]
    assert sum("no file can be called" in scan.fault or "which no" in scan.fault for scan in scans) == 3


def test_a_phrase_without_end_is_refused():
    with pytest.raises(PromptUnknown, match="too long"):
        understand("liver and " * 100_000)


def test_a_card_with_short_tuples_is_refused():
    root = Path(__file__).resolve().parents[2]
    table = json.loads((root / "Resources/Cards/starter.json").read_text(encoding="utf-8"))
    table["prepare"]["intensity"]["clip"] = []
    with pytest.raises(CardInvalid):
        card_from(table)


@pytest.mark.parametrize(
    "change",
    [
        {"patch_kji": 3},
        {"mapping": {"1": ["liver"]}},
        {"mapping": [1]},
        {"unlabelled": 5},
        {"teach": 1, "unlabelled": ["x"]},
        {"replay": {"tasks": ["task.json"], "cases": 2}},
        {"replay": {"tasks": ["task.json"], "share": "x"}},
    ],
)
def test_a_task_of_wrong_types_is_refused(tmp_path, a_tiny_card, change):
    for name in ("a", "b"):
        written(tmp_path / f"{name}.nii.gz", gzip.compress(nifti()))
    cases = [{"image": "a.nii.gz", "label": f"{n}.nii.gz", "fold": k} for k, n in enumerate("ab")]
    written(tmp_path / "list.json", json.dumps({"training": cases}))
    task = {"card": "x", "head": "h", "dataset": "list.json", "mapping": {"1": "liver"}, "epochs": 1}
    path = written(tmp_path / "task.json", json.dumps(task | change))
    with pytest.raises(TaskInvalid):
        task_of(read_task(path), a_tiny_card, tmp_path, tmp_path)


def test_a_task_file_nested_without_end_is_refused(tmp_path):
    with pytest.raises(TaskInvalid, match="not a readable task"):
        read_task(written(tmp_path / "t.json", DEEP))


class Runs:
    """Calls a function when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch ran",)


@pytest.mark.parametrize(
    "raw",
    {
        "code": pickle.dumps(Runs()),
        "notes": b"\x80\x02K\x01r\xff\xff\xff\x7f.",
        "an array of terabytes": b"\x80\x02cnumpy\nndarray\nM\xff\xff\x8a\x05\xff\xff\xff\xff\x00\x86\x85R.",
        "a number of gigabytes": b"\x80\x02cnumpy._core.multiarray\nscalar\n"
        b"cnumpy\ndtype\nX\x0b\x00\x00\x00V2000000000\x85R\x85R.",
        "an encoding": b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x06\x00\x00\x00base64\x86R.",
    }.values(),
)
def test_a_pickle_that_does_more_than_hold_data_is_refused(tmp_path, monkeypatch, raw):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightsCorrupt):
        read_pickled(written(tmp_path / "plans.pkl", raw))
    with pytest.raises(WeightsCorrupt):
        read_checkpoint(written(tmp_path / "c.pth", raw))
    assert not (tmp_path / "ran").exists()


def test_a_pickle_of_plans_is_read(tmp_path):
    plans = {"a": np.arange(6.0).reshape(2, 3), "b": np.float64(2.5), "c": {1, 2}, "d": [None, "x", b"\xff"]}
    for protocol in (0, 2, 4):
        read = read_pickled(written(tmp_path / "plans.pkl", pickle.dumps(plans, protocol=protocol)))
        assert np.array_equal(read.pop("a"), plans["a"])
        assert read == {key: value for key, value in plans.items() if key != "a"}


@pytest.mark.parametrize("name", ["nul", "a/CON.json", "\x1b.json", "C:x.json", "~/x.json", "..\\x.json"])
def test_an_archive_names_no_device_and_no_other_folder(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.writestr(name, b"x")
    with pytest.raises(WeightsCorrupt, match="outside its folder"):
        unpack(tmp_path / "z.zip", tmp_path / "out", lambda name: True)


def test_a_bomb_in_an_archive_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr("CTSegLogic.files.archive._ROOMY", 1 << 20)
    with zipfile.ZipFile(tmp_path / "z.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.json", bytes(2 << 20))
    with pytest.raises(WeightsCorrupt, match="would unpack"):
        unpack(tmp_path / "z.zip", tmp_path / "out", lambda name: True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "table", [DEEP, '[["x", [2, 3, 4, 5]]]', "[[0, [-2, -3, 4, 5]]]", "[[0, [1e400]]]", "[[0, [120]]]"]
)
def test_a_cache_of_features_with_an_odd_table_counts_as_absent(tmp_path, table):
    raw = bytes(240) + table.encode() + len(table).to_bytes(8, "little")
    written(tmp_path / "k.features", raw)
    assert FeatureFolder(folder=tmp_path, limit=1 << 30).read("k") == []


def voxels(head: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head.encode() + bytes(240)


@pytest.mark.parametrize(
    "head",
    [
        "{'descr': '<i2', 'fortran_order': False, 'shape': (1, 30000, 30000, 30000), }",
        "(((",
        "{'descr': '|O', }",
    ],
)
def test_voxels_that_are_not_there_are_refused(tmp_path, head):
    written(tmp_path / "voxels.npy", voxels(head))
    grid = {"shape": [4, 5, 6], "affine": np.eye(4).tolist()}
    job = {"folder": str(tmp_path), "voxels": "voxels.npy", "grid": grid, "modality": "", "name": "x"}
    job |= {"warnings": [], "prompt": {"kind": "everything"}, "card": None, "quality": "fast", "roi": None}
    with pytest.raises(CTSegError, match="broken message"):
        read_job(job)
    layers = [{"file": "voxels.npy", "start": [0, 0, 0], "stop": [4, 5, 6]}]
    with pytest.raises(CTSegError, match="broken result"):
        read_result({"folder": str(tmp_path), "grid": grid, "layers": layers, "entries": [], "origin": {}})


def test_a_worker_hears_on_after_lines_that_are_no_messages():
    lines = ['{"do": "cancel", "id": []}', '{"do": {}, "id": {}}', "[]", DEEP, '{"do": "forget", "id": 9}']
    out = io.StringIO()
    assert Worker(Run(), io.StringIO("\n".join(lines) + "\n"), out).run() == 0
    said = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [m["event"] for m in said] == ["ready", *["error"] * 4, "forgotten"]


def test_users_fields_in_headers_are_let_through(tmp_path):
    more = "0008|0060 = CT\nITK_InputFilterName = NiftiImageIO\nmy own field = a = b\n"
    meta = written(tmp_path / "x.mha", (more + META).encode() + VOXELS.tobytes())
    text = NRRD + 'space units: "mm" "mm" "mm"\nkinds: domain domain domain\nmy key:=' + "v" * 5000 + "\n\n"
    nrrd = written(tmp_path / "x.nrrd", text.encode() + VOXELS.tobytes())
    assert np.array_equal(read_image(meta).array, read_image(nrrd).array)


@pytest.mark.parametrize("version", ["../../x", "\0", "a/b", ""])
def test_a_version_that_leads_out_of_the_folder_is_refused(version):
    root = Path(__file__).resolve().parents[2]
    table = json.loads((root / "Resources/Cards/starter.json").read_text(encoding="utf-8"))
    with pytest.raises(CardInvalid, match="version"):
        card_from(table | {"version": version})


@pytest.mark.parametrize("kinds", [(0, 2, 2, 2), (2, 2, 0, 2), (2, 2, 2, 1), (4, 4, 4, 4), (2, None, 2, 2)])
def test_pages_of_several_kinds_in_a_tiff_are_refused(tmp_path, kinds):
    """ITK counts some of the pages and writes all of them: the process died, at times later."""
    import SimpleITK as sitk

    path = tmp_path / "a.tif"
    sitk.WriteImage(sitk.GetImageFromArray(VOXELS), str(path))
    assert np.array_equal(read_image(path).array[0], VOXELS)
    tag = struct.pack("<HHI", 254, 4, 1)
    first, *parts = path.read_bytes().split(tag)
    assert len(parts) == len(kinds)
    said = [tag if kind is not None else struct.pack("<HHI", 253, 4, 1) for kind in kinds]
    pages = [
        how + struct.pack("<I", kind or 0) + part[4:]
        for how, kind, part in zip(said, kinds, parts, strict=True)
    ]
    path.write_bytes(first + b"".join(pages))
    with pytest.raises(ImageInvalid, match="pages of several kinds"):
        read_image(path)


def test_pages_of_a_tiff_that_go_in_circles_or_nowhere_are_refused(tmp_path):
    path, page = tmp_path / "a.tif", struct.pack("<HHHII", 1, 254, 4, 1, 2)
    for follower, why in ((8, "circles"), (10**6, "ends before")):
        path.write_bytes(b"II*\0" + struct.pack("<I", 8) + page + struct.pack("<I", follower))
        with pytest.raises(ImageInvalid, match=why):
            read_image(path)
    path.write_bytes(b"II+\0" + page)
    with pytest.raises(ImageInvalid, match="begin as a TIFF"):
        read_image(path)


@pytest.mark.parametrize("off", [3.0, 1e7])
def test_contours_in_no_parallel_planes_are_refused(off):
    """A grid along them was looked for without end."""
    flat = np.array([[0.0, 0, 0], [10, 0, 0], [10, 10, 0], [0, 10, 0]])
    upright = np.array([[0.0, 0, 0], [10, 0, 0], [10, 0, 9], [0, 0, 9]]) + off
    grid = Grid.of((20, 20, 20), spacing_mm=(2, 2, 2), origin_ras=(20, 20, -20))
    assert filled([flat, flat + np.array([0, 0, 4])], grid).any()
    with pytest.raises(ImageInvalid, match="leaves its region's planes"):
        filled([flat, upright], grid)


def test_a_contour_bent_by_less_than_half_a_slice_is_filled():
    bent = np.array([[0.0, 0, 0.2], [12, 0, -0.2], [12, 12, 0.2], [0, 12, -0.2]])
    grid = Grid.of((20, 20, 20), spacing_mm=(2, 2, 2), origin_ras=(20, 20, -20))
    assert filled([bent, bent + np.array([0, 0, 2])], grid).sum() > 20


@pytest.mark.parametrize("rows", [["gizmo"], [3], 3, [{"name": "no key"}]])
def test_structures_that_are_none_are_refused_with_the_card_even_without_heads(rows):
    root = Path(__file__).resolve().parents[2]
    table = json.loads((root / "Resources/Cards/bodypart.json").read_text(encoding="utf-8"))
    assert card_from(table).structures == ()
    with pytest.raises(CardInvalid, match="malformed"):
        card_from({**table, "structures": rows})


def test_a_text_among_the_sizes_of_kept_features_is_no_size(tmp_path):
    """Its product with a number was a text of 2 GB."""
    table = b'[[0, [9999999999999999, "0", 4, 5]]]'
    (tmp_path / "k.features").write_bytes(bytes(240) + table + len(table).to_bytes(8, "little"))
    assert FeatureFolder(folder=tmp_path, limit=1 << 20).read("k") == []


BENT_KIND = (
    b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(X\x02\x00\x00\x00%sK\x00K\x01tR"
    b"(K\x03X\x01\x00\x00\x00<%sJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tbC\x08\0\0\0\0\0\0\xf0?tR."
)


@pytest.mark.parametrize(
    ("code", "state"), [(b"O8", b"NNN"), (b"f8", b"(NNt"), (b"f8", b"NN}"), (b"V8", b"NNN")]
)
def test_types_of_numpy_that_crash_it_are_refused(tmp_path, code, state):
    (tmp_path / "plans.pkl").write_bytes(b"\x80\x03" + BENT_KIND % (b"f8", b"NNN"))
    assert read_pickled(tmp_path / "plans.pkl") == 1.0
    (tmp_path / "plans.pkl").write_bytes(b"\x80\x03" + BENT_KIND % (code, state))
    with pytest.raises(WeightsCorrupt):
        read_pickled(tmp_path / "plans.pkl")
