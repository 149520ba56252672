"""Reading images: every format, and every kind of bad input refused with what to do."""

from __future__ import annotations

import gzip

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from CTSegLogic.files.images import read_image, read_labels, stem
from CTSegLogic.files.segfile import write_nifti
from CTSegLogic.values.errors import ImageInvalid

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def as_itk(volume):
    image = sitk.GetImageFromArray(volume.array[0])
    affine = LPS_TO_RAS @ volume.grid.affine[:, [2, 1, 0, 3]]
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((affine[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    return image


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".nrrd", ".mha", ".nhdr", ".mhd"])
def test_every_format_gives_the_same_voxels_in_the_same_place(tmp_path, a_tilted_ct, ending):
    path = tmp_path / f"scan{ending}"
    sitk.WriteImage(as_itk(a_tilted_ct), str(path), useCompression=ending != ".nii")
    volume = read_image(path, modality="CT")
    assert volume.grid.matches(a_tilted_ct.grid, tol_mm=2e-3)
    assert np.array_equal(volume.array, a_tilted_ct.array)
    assert volume.array.dtype == np.int16
    assert (volume.name, volume.modality) == ("scan", "CT")


def test_what_this_package_writes_itk_reads_alike(tmp_path, a_tilted_ct):
    path = tmp_path / "x.nii.gz"
    write_nifti(a_tilted_ct.array[0], a_tilted_ct.grid, path)
    image = sitk.ReadImage(str(path))
    mine = as_itk(a_tilted_ct)
    assert np.array_equal(sitk.GetArrayFromImage(image), a_tilted_ct.array[0])
    assert np.allclose(image.GetOrigin(), mine.GetOrigin(), atol=1e-3)
    assert np.allclose(image.GetDirection(), mine.GetDirection(), atol=1e-5)


def nifti(array_ijk, **header):
    image = nibabel.Nifti1Image(array_ijk, np.diag([2.0, 2, 3, 1]))
    for key, value in header.items():
        image.header[key] = value
    return image


def test_scaled_big_endian_and_nifti2_files(tmp_path):
    values = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6)
    swapped = nibabel.Nifti1Image(values.astype(">i2"), np.eye(4), nibabel.Nifti1Header(endianness=">"))
    nibabel.save(swapped, tmp_path / "big.nii.gz")
    nibabel.save(nibabel.Nifti2Image(values, np.eye(4)), tmp_path / "two.nii.gz")
    for name in ("big", "two"):
        assert np.array_equal(read_image(tmp_path / f"{name}.nii.gz").array[0], values.T)
    scaled = nibabel.Nifti1Image(values, np.eye(4))
    scaled.header.set_slope_inter(0.5, -1024)
    scaled.to_filename(tmp_path / "scaled.nii")
    raw = bytearray((tmp_path / "scaled.nii").read_bytes())
    raw[112:120] = np.array([0.5, -1024], "<f4").tobytes()
    (tmp_path / "scaled.nii").write_bytes(raw)
    assert read_image(tmp_path / "scaled.nii").array[0].max() == pytest.approx(0.5 * 119 - 1024)


def test_metres_and_microns_become_millimetres(tmp_path):
    for unit, factor in (("meter", 1000), ("micron", 0.001), ("mm", 1)):
        image = nifti(np.zeros((4, 5, 6), np.int16))
        image.header.set_xyzt_units(unit)
        nibabel.save(image, tmp_path / "u.nii")
        assert read_image(tmp_path / "u.nii").grid.spacing == pytest.approx(
            (3 * factor, 2 * factor, 2 * factor)
        )


def test_a_file_without_orientation_is_read_with_a_warning(tmp_path):
    image = nibabel.Nifti1Image(np.zeros((4, 5, 6), np.int16), None)
    image.header.set_zooms((1, 2, 3))
    nibabel.save(image, tmp_path / "o.nii")
    assert "orientation" in read_image(tmp_path / "o.nii").warnings[0]


def test_several_files_are_channels_of_one_grid(tmp_path, a_tilted_ct, an_axial_ct):
    for name, volume in (("a", a_tilted_ct), ("b", a_tilted_ct), ("c", an_axial_ct)):
        write_nifti(volume.array[0], volume.grid, tmp_path / f"{name}.nii.gz")
    both = read_image([tmp_path / "a.nii.gz", tmp_path / "b.nii.gz"])
    assert both.channels == 2
    with pytest.raises(ImageInvalid, match="another grid"):
        read_image([tmp_path / "a.nii.gz", tmp_path / "c.nii.gz"])


def test_an_announced_4d_file_is_a_set_of_channels(tmp_path):
    nibabel.save(
        nifti(np.random.default_rng(0).normal(size=(4, 5, 6, 2)).astype(np.float32)), tmp_path / "f.nii.gz"
    )
    assert read_image(tmp_path / "f.nii.gz", channels=2).array.shape == (2, 6, 5, 4)


@pytest.mark.parametrize("name", ["e.nii", "e.nii.gz"])
def test_an_extension_longer_than_what_is_read_first_is_no_damage(tmp_path, name):
    """TotalSegmentator writes its legend, twelve thousand bytes of XML, between header and voxels."""
    image = nifti(np.random.default_rng(0).integers(0, 99, (4, 5, 6)).astype(np.int16))
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"legend " * 2000))
    nibabel.save(image, tmp_path / name)
    assert np.array_equal(read_image(tmp_path / name).array[0], np.asarray(image.dataobj).T)


def broken_nan(path):
    array = np.zeros((4, 5, 6), np.float32)
    array[1, 1, 1], array[2, 2, 2] = np.nan, np.inf
    nibabel.save(nifti(array), path)


def broken_truncated(path):
    nibabel.save(nifti(np.random.default_rng(0).integers(0, 999, (20, 20, 20)).astype(np.int16)), path)
    path.write_bytes(path.read_bytes()[:-900])


def broken_inner(path):
    raw = nifti(np.zeros((20, 20, 20), np.int16)).to_bytes()
    path.write_bytes(gzip.compress(raw[:-500]))


def broken_spacing(path, value):
    image = nifti(np.zeros((4, 5, 6), np.int16), sform_code=0, qform_code=1)
    raw = bytearray(image.to_bytes())
    raw[80:84] = np.float32(value).tobytes()  # pixdim[1]
    raw[252:256] = np.array([1, 0], "<i2").tobytes()  # qform yes, sform no
    path.write_bytes(gzip.compress(bytes(raw)))


def broken_sform(path):
    image = nifti(np.zeros((4, 5, 6), np.int16))
    raw = bytearray(image.to_bytes())
    raw[280:328] = np.zeros(12, np.float32).tobytes()
    path.write_bytes(gzip.compress(bytes(raw)))


def broken_rgb(path):
    rgb = np.zeros((4, 5, 6), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    nibabel.save(nibabel.Nifti1Image(rgb, np.eye(4)), path)


BROKEN = {
    "truncated gz": (broken_truncated, "damaged or cut off"),
    "voxels missing inside the gz": (broken_inner, "ends before its last voxel"),
    "not finite": (broken_nan, "2 voxels that are NaN or infinite"),
    "empty affine": (broken_sform, "degenerate"),
    "nan spacing": (lambda p: broken_spacing(p, np.nan), "not finite and above zero"),
    "spacing of zero": (lambda p: broken_spacing(p, 0.0), "above zero"),
    "2D": (lambda p: nibabel.save(nifti(np.zeros((4, 5), np.int16)), p), "2D"),
    "one slice": (lambda p: nibabel.save(nifti(np.zeros((4, 5, 1), np.int16)), p), "single slice"),
    "unannounced 4D": (lambda p: nibabel.save(nifti(np.zeros((4, 5, 6, 3), np.int16)), p), "3 volumes"),
    "colour": (broken_rgb, "colour"),
    "empty": (lambda p: p.write_bytes(b""), "empty"),
    "no gzip": (lambda p: p.write_bytes(b"hello" * 300), "damaged or cut off"),
    "gzip of nonsense": (lambda p: p.write_bytes(gzip.compress(b"hello" * 300)), "not a readable NIfTI"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_bad_nifti_is_refused_with_two_sentences(tmp_path, name):
    make, seen = BROKEN[name]
    path = tmp_path / "bad.nii.gz"
    make(path)
    with pytest.raises(ImageInvalid) as caught:
        read_image(path)
    assert seen in caught.value.seen
    assert len(caught.value.hint) > 10


def test_bad_nrrd_mha_and_colour(tmp_path, a_tilted_ct):
    sitk.WriteImage(as_itk(a_tilted_ct), str(tmp_path / "t.nrrd"), useCompression=True)
    whole = (tmp_path / "t.nrrd").read_bytes()
    (tmp_path / "t.nrrd").write_bytes(whole[: len(whole) // 2])
    colour = sitk.Compose([sitk.Cast(as_itk(a_tilted_ct), sitk.sitkUInt8)] * 3)
    sitk.WriteImage(colour, str(tmp_path / "c.mha"))
    (tmp_path / "e.mha").write_bytes(b"")
    (tmp_path / "n.nrrd").write_bytes(b"NRRD0004\nhello")
    for name, seen in (
        ("t.nrrd", "cannot be read"),
        ("c.mha", "colour"),
        ("e.mha", "empty"),
        ("n.nrrd", "cannot be read"),
    ):
        with pytest.raises(ImageInvalid, match=seen):
            read_image(tmp_path / name)


def test_missing_files_and_fractions_for_labels(tmp_path):
    with pytest.raises(ImageInvalid, match="There is no image"):
        read_image(tmp_path / "none.nii.gz")
    nibabel.save(nifti(np.full((4, 5, 6), 0.5, np.float32)), tmp_path / "p.nii.gz")
    with pytest.raises(ImageInvalid, match="fractions"):
        read_labels(tmp_path / "p.nii.gz")
    nibabel.save(nifti(np.full((4, 5, 6), 3.0, np.float32)), tmp_path / "l.nii.gz")
    assert read_labels(tmp_path / "l.nii.gz")[0].dtype == np.int32


def test_stems():
    for name in ("scan.nii.gz", "scan.seg.nrrd", "scan.nrrd", "scan.mha", "scan.rt.dcm", "scan"):
        assert stem(name) == "scan"
