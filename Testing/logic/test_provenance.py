"""Every output says how it came about: models and their checksums, versions, options, device, seconds."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pydicom
import pytest
from dicom_phantoms import Scan, ball

from CTSegLogic.app.cli import main
from CTSegLogic.files.dicomnotes import patient_tags, provenance_in
from CTSegLogic.files.images import read_image
from CTSegLogic.files.segfile import read_segmentation
from CTSegLogic.files.weights import file_sha256, publish
from CTSegLogic.values.grid import Grid
from CTSegLogic.values.prediction import Origin, merge
from CTSegLogic.values.prediction import prediction_of as of_maps
from CTSegLogic.values.structures import vocabulary

ASK = ("--model", "tiny", "--device", "cpu", "--quality", "fast")


@pytest.fixture
def a_study(tmp_path, an_empty_home, a_tiny_card):
    """A DICOM series, and a published model that can segment it."""
    publish(a_tiny_card.folder)
    Scan(hu=ball((0.0, 0.0, 56.0), 12.0)).write(tmp_path / "ct")
    return tmp_path / "ct"


def origin_in(path):
    """The origin that an output tells, and the flags' kinds by key."""
    if path.name.endswith(".seg.nrrd"):
        head = path.read_bytes().split(b"\n\n")[0].decode()
        tags = re.findall(r"Tags:=.*CTSeg.Key:(\w+)\|CTSeg.Status:automatic, unreviewed\|(.*)", head)
        kinds = {key: re.findall(r"CTSeg.Flags:([^|]*)\|", rest) for key, rest in tags}
        flags = {key: found[0].split(",") for key, found in kinds.items() if found}
        return json.loads(re.search(r"CTSeg_Origin:=(.*)", head)[1]), flags
    if path.name.endswith(".dcm"):
        told = provenance_in(pydicom.dcmread(path))
        return told["origin"], {k: [f["kind"] for f in flags] for k, flags in told["flags"].items()}
    table = json.loads(path.read_text())
    entries = table.get("structures") or list(table["labels"].values())
    flags = {e["key"]: [f["kind"] for f in e["flags"]] for e in entries if e["flags"]}
    return table["origin"], flags


def test_all_outputs_of_a_scan_tell_the_same_and_all_of_it(tmp_path, a_study, a_tiny_card, capsys):
    told = {}
    for ending in (".seg.nrrd", ".nii.gz", ".seg.dcm", ".rt.dcm"):
        out, report = tmp_path / f"o{ending}", tmp_path / f"r{ending}.json"
        assert main(["segment", str(a_study), "-o", str(out), *ASK, "--report", str(report)]) == 0
        told[ending] = origin_in(tmp_path / "o.json" if ending == ".nii.gz" else out)
        assert origin_in(report) == told[ending]
    for origin, flags in told.values():
        (card,) = origin["cards"]
        assert (card["name"], card["version"]) == ("tiny", "1.0")
        file = a_tiny_card.folder / "kidneys.safetensors"
        assert card["sha256:kidneys"] == file_sha256(file)
        assert origin["status"] == "automatic, unreviewed"
        assert {"ctseg", "python", "torch", "numpy", "platform"} <= origin["versions"].keys()
        assert origin["versions"]["numpy"] == np.__version__
        assert origin["options"]["quality"] == "fast"
        assert origin["options"]["device"] == "cpu"
        assert origin["options"]["model"] == "tiny"
        assert {"precision", "backend", "overlap", "seed"} <= origin["options"].keys()
        assert origin["seconds"]["network"] > 0
        assert flags == told[".seg.nrrd"][1]
    assert told[".seg.nrrd"][1], "the random model raises some flag"
    timeless = [json.dumps({**o, "seconds": 0}, sort_keys=True) for o, _ in told.values()]
    assert len({re.sub(r'"memory": "[^"]*"', "", text) for text in timeless}) == 1


def test_dicom_results_say_unreviewed_and_why_to_look(tmp_path, a_study):
    for ending, tag in ((".seg.dcm", "SegmentSequence"), (".rt.dcm", "StructureSetROISequence")):
        out = tmp_path / f"o{ending}"
        assert main(["segment", str(a_study), "-o", str(out), *ASK]) == 0
        data = pydicom.dcmread(out)
        assert any(str(v).startswith("torch ") for v in data.SoftwareVersions)
        texts = [str(i.get("SegmentDescription") or i.get("ROIDescription")) for i in data[tag].value]
        assert all(text.startswith("automatic, unreviewed") for text in texts)
        assert any("; " in text for text in texts)
        assert read_segmentation(out, grid=read_image(a_study).grid).entries


def test_patient_tags_stay_out_unless_asked_for(tmp_path, a_study):
    volume = read_image(a_study)
    tags = patient_tags(volume)
    assert {"name", "ID"} <= tags.keys()
    asked = ["segment", str(a_study), "-o", str(tmp_path / "o.seg.nrrd"), *ASK, "--overwrite"]
    files = [tmp_path / "r.json", tmp_path / "p.html"]
    asked += ["--report", str(files[0]), "--html", str(files[1])]
    assert main([*asked[:-4], "--patient-tags"]) == 2
    assert main(asked) == 0
    for path in (*files, tmp_path / "o.seg.nrrd"):
        raw = path.read_bytes()
        assert not [text for text in tags.values() if len(text) > 2 and text.encode() in raw]
    assert main([*asked, "--patient-tags"]) == 0
    for path in files:
        assert tags["name"] in path.read_text()
    assert json.loads(files[0].read_text())["patient"] == tags


def test_options_of_several_models_are_told_apart_where_they_differ():
    found = of_maps([(np.ones((3, 3, 3), np.uint8), {1: vocabulary()["liver"]})], Grid.of((3, 3, 3)))
    parts = [
        replace(
            found,
            origin=Origin(
                cards=({"name": name, "version": "1"},),
                options={"device": "cpu", "overlap": overlap},
                versions={"torch": "2"},
            ),
        )
        for name, overlap in (("a", "0.5"), ("b", "0.25"))
    ]
    origin = merge(parts).origin
    assert origin.options == {"device": "cpu", "overlap": "a: 0.5; b: 0.25"}
    assert origin.versions == {"torch": "2"}


def test_a_model_that_was_named_by_its_folder_is_told_by_its_name(tmp_path, a_study, a_tiny_card):
    out = tmp_path / "o.nii.gz"
    named = ("--model", str(a_tiny_card.folder), "--device", "cpu", "--quality", "fast")
    assert main(["segment", str(a_study), "-o", str(out), *named]) == 0
    legend = (tmp_path / "o.json").read_text(encoding="utf-8")
    assert json.loads(legend)["origin"]["options"]["model"] == "tiny"
    assert a_tiny_card.folder.parent.name not in legend
