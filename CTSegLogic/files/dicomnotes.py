"""What a DICOM result says of how it came about, and of what is to be looked at."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from CTSegLogic.files.dicom import program_version
from CTSegLogic.files.dicomheaders import read_headers
from CTSegLogic.values.prediction import UNREVIEWED, Entry, Prediction
from CTSegLogic.values.volume import Volume

_TAGS = {
    "PatientName": "name",
    "PatientID": "ID",
    "PatientBirthDate": "born",
    "PatientSex": "sex",
    "StudyDate": "study date",
    "AccessionNumber": "accession number",
}
_PRIVATE_GROUP, _CREATOR = 0x4353, "CTSegExtension"


def add_provenance(data: Any, prediction: Prediction) -> None:
    """Puts how a result came about into a data set: software versions, and all of it as JSON in a private
    element (4353,xx01) of the creator CTSegExtension."""
    origin = prediction.origin
    libraries = [f"{name} {origin.versions[name]}" for name in ("torch", "numpy") if name in origin.versions]
    data.SoftwareVersions = [program_version(), *libraries]
    flags = {e.structure.key: [asdict(f) for f in e.flags] for e in prediction.entries if e.flags}
    text = json.dumps({"origin": asdict(origin), "flags": flags}, ensure_ascii=True, sort_keys=True)
    data.private_block(_PRIVATE_GROUP, _CREATOR, create=True).add_new(0x01, "UT", text)


def provenance_in(data: Any) -> dict[str, Any]:
    """What `add_provenance` has put into a data set; empty where it has not."""
    try:
        text = data.private_block(_PRIVATE_GROUP, _CREATOR)[0x01].value
    except KeyError:
        return {}
    return dict(json.loads(text.decode() if isinstance(text, bytes) else text))


def patient_tags(volume: Volume) -> dict[str, str]:
    """Name, ID and dates of a scan's patient, by what a person calls them; empty for a scan not from DICOM.

    Raises:
        ImageInvalid: the files the scan was read from are gone.
    """
    if volume.dicom is None:
        return {}
    header = read_headers(volume.dicom["files"][:1])[0]
    found = {name: str(header.get(keyword) or "") for keyword, name in _TAGS.items()}
    return {name: text for name, text in found.items() if text}


def remark_on(entry: Entry) -> str:
    """The sentence about a structure that its DICOM result carries: unreviewed, and its flags."""
    flags = "; ".join(flag.text for flag in entry.flags)
    return f"{UNREVIEWED}; {flags}" if flags else UNREVIEWED
