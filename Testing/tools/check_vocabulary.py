"""Check the anatomical vocabulary in Resources/Labels: codes, twins, colors, sets and mappings.

    python Testing/tools/check_vocabulary.py [--terminology FILE.term.json ...] [--totalsegmentator CSV]

A code is right when the table it claims to come from lists its value with that very meaning. pydicom is
always at hand; Slicer's terminology files and TotalSegmentator's SNOMED table are compared when given.
Exit status 1 with one line per problem, 0 with a count.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

LABELS = Path(__file__).resolve().parents[2] / "Resources" / "Labels"
COLUMNS = [
    "key", "name", "kind", "laterality", "region", "groups", "modality", "tg263", "latin", "aliases",
    "translations", "category", "type", "modifier", "code_source", "color", "ml_min", "ml_max",
]  # fmt: skip
KINDS = {"organ", "lesion", "station", "target"}
REGIONS = {
    "head", "neck", "thorax", "abdomen", "pelvis", "spine", "upper limb", "lower limb", "whole body", "brain",
}  # fmt: skip
MODALITIES = {"CT", "MR", "CT|MR"}
LANGUAGES = {"de", "fr", "es", "zh"}
SOURCES = {"pydicom", "slicer", "totalsegmentator", "private"}
PRIVATE = "99CTSEG"
SIDES = {"left": "SCT^7771000^Left", "right": "SCT^24028007^Right"}
VALUES = {
    "kind": KINDS,
    "laterality": {"", *SIDES},
    "region": REGIONS,
    "modality": MODALITIES,
    "code_source": SOURCES,
}
# The categories Slicer offers, and DICOM's own for planning targets: the few triplets all rows share.
CATEGORIES = {
    "SCT^123037004^Anatomical Structure",
    "SCT^85756007^Tissue",
    "SCT^49755003^Morphologically Altered Structure",
    "SCT^260787004^Physical object",
    "DCM^130041^RT Target",
}
FORBIDDEN_COLORS = {"#808080", "#000000", "#ffffff"}  # Slicer's "no color given", and what no overlay shows
# Slips of the pen in a source table; the vocabulary writes the word as it is spelled.
MISSPELLED = {"Gluteus minius muscle": "Gluteus minimus muscle"}
# SNOMED's semantic tag is not part of a DICOM code meaning.
TAGS = "body structure|observable entity|physical object|morphologic abnormality"
SEMANTIC_TAG = re.compile(rf"\s*\(({TAGS})\)$")
LONGEST_MEANING = 64  # characters, DICOM value representation LO

Row = dict[str, str]
Table = dict[tuple[str, str], set[str]]


def words(cell: str) -> list[str]:
    """The entries of a `|`-separated cell; none for an empty one."""
    return cell.split("|") if cell else []


def read_rows(path: Path) -> list[Row]:
    """The rows of structures.csv as text."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def twin_of(key: str) -> str:
    """The same key on the other side; the key itself when it names no side."""
    return "_".join({"left": "right", "right": "left"}.get(part, part) for part in key.split("_"))


def spelled(meaning: str) -> str:
    """A table's meaning as the vocabulary writes it."""
    plain = SEMANTIC_TAG.sub("", meaning.strip())
    return MISSPELLED.get(plain, plain)


def pydicom_table() -> Table:
    """(scheme, value) -> meanings of the DICOM and SNOMED concepts the installed pydicom knows."""
    from pydicom.sr.codedict import codes

    table: Table = defaultdict(set)
    for scheme in (codes.SCT, codes.DCM):
        for code in scheme.concepts.values():
            table[code.scheme_designator, code.value].add(spelled(code.meaning))
    return table


def slicer_table(paths: Iterable[Path]) -> Table:
    """(scheme, value) -> meanings in Slicer terminology or anatomic-context files, at any depth."""
    table: Table = defaultdict(set)
    waiting = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    while waiting:
        node = waiting.pop()
        if isinstance(node, list):
            waiting.extend(node)
        elif isinstance(node, dict):
            waiting.extend(node.values())
            if "CodeValue" in node:
                table[node["CodingSchemeDesignator"], node["CodeValue"]].add(spelled(node["CodeMeaning"]))
    return table


def totalsegmentator_table(path: Path) -> Table:
    """(scheme, value) -> meanings in TotalSegmentator's SNOMED table."""
    table: Table = defaultdict(set)
    for row in read_rows(path):
        for column, value in row.items():
            if column.endswith(".CodeValue") and value:
                stem = column.removesuffix("CodeValue")
                scheme, meaning = row[f"{stem}CodingSchemeDesignator"], row[f"{stem}CodeMeaning"]
                table[scheme, value].add(spelled(meaning))
    return table


def identity_problems(rows: list[Row]) -> Iterator[str]:
    """What is wrong with keys, names and TG-263 names across the table."""
    for column in ("key", "name", "tg263"):
        counts = Counter(row[column].casefold() for row in rows if row[column])
        for value, count in counts.items():
            if count > 1:
                yield f"{column} {value!r} is used by {count} rows"
    for row in rows:
        if not re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)*", row["key"]):
            yield f"{row['key']}: not lower snake case"
        if row["name"].casefold() in ("", "left", "right") or row["name"] != row["name"].strip():
            yield f"{row['key']}: {row['name']!r} does not name a structure"


def field_problems(row: Row) -> Iterator[str]:
    """What is wrong with the words of one row."""
    for column, values in VALUES.items():
        if row[column] not in values:
            yield f"{column} {row[column]!r} is not one of {sorted(values)}"
    for column in ("groups", "aliases", "translations", "latin"):
        entries = words(row[column])
        if len({entry.casefold() for entry in entries}) < len(entries):
            yield f"{column} says one thing twice"
        if any(not entry or entry != entry.strip() for entry in entries):
            yield f"{column} holds an empty or padded entry"
    if row["groups"] != row["groups"].lower():
        yield "groups are not lower case"
    if row["name"].casefold() in (alias.casefold() for alias in words(row["aliases"])):
        yield "an alias repeats the name"
    for entry in words(row["translations"]):
        language, _, word = entry.partition(":")
        if language not in LANGUAGES or not word.strip():
            yield f"translation {entry!r} is not language:word"


def color_and_size_problems(row: Row) -> Iterator[str]:
    """What is wrong with a row's color and plausible volume."""
    color = row["color"]
    if not re.fullmatch(r"#[0-9a-f]{6}", color) or color in FORBIDDEN_COLORS:
        yield f"color {color!r} is not a usable #rrggbb"
    if bool(row["ml_min"]) != bool(row["ml_max"]):
        yield "only one end of the volume range is given"
    elif row["ml_min"] and not 0 <= float(row["ml_min"]) < float(row["ml_max"]):
        yield f"volume range {row['ml_min']}..{row['ml_max']} mL is empty"


def side_problems(row: Row, by_key: dict[str, Row]) -> Iterator[str]:
    """What is wrong with a row's laterality, seen with its twin."""
    key, side = row["key"], row["laterality"]
    twin = by_key.get(twin_of(key))
    if not side:
        # A key may name a side without being one of a pair: there is no left lung middle lobe.
        if twin is not None and twin is not row:
            yield f"has the twin {twin['key']} but no laterality"
        return
    other = "right" if side == "left" else "left"
    if side not in key.split("_") or side not in row["name"].split():
        yield f"laterality {side} is not in key and name"
    if twin is None or twin["laterality"] != other:
        yield f"has no {other} twin {twin_of(key)}"
        return
    for column in ("kind", "region", "modality", "translations", "ml_min", "ml_max"):
        # Lobes differ from side to side in size, as do the two ventricles of the heart.
        if twin[column] != row[column] and not (column.startswith("ml_") and row["region"] == "thorax"):
            yield f"{column} differs from that of {twin['key']}"
    if any(alias.casefold().startswith((f"{side} ", f"{other} ")) for alias in words(row["aliases"])):
        yield "an alias repeats the side"


def triplet_problems(row: Row) -> Iterator[str]:
    """What is wrong with the form of a row's code triplets."""
    for column in ("category", "type", "modifier"):
        parts = row[column].split("^")
        if row[column] and (len(parts) != 3 or not all(parts)):
            yield f"{column} {row[column]!r} is not SCHEME^value^meaning"
        elif len(parts[-1]) > LONGEST_MEANING:
            yield f"{column} has a meaning of more than {LONGEST_MEANING} characters"
    if row["category"] not in CATEGORIES:
        yield f"category {row['category']!r} is not one of the shared ones"
    if row["code_source"] == "private":
        wanted = f"{PRIVATE}^{row['key']}^{row['name']}"
        if row["type"] != wanted or row["modifier"]:
            yield f"a private row needs the type {wanted} and no modifier"
    elif row["type"].startswith(f"{PRIVATE}^"):
        yield f"scheme {PRIVATE} with source {row['code_source']}"
    elif row["laterality"]:
        # The side is said once: by the concept ("Left atrium") or by the modifier, not by both.
        said = {word for word in ("left", "right") if word in row["type"].lower().replace("^", " ").split()}
        wanted = "" if said else SIDES[row["laterality"]]
        if row["modifier"] != wanted or said - {row["laterality"]}:
            yield f"type {row['type']} and modifier {row['modifier']!r} do not say {row['laterality']} once"


def code_problems(row: Row, tables: dict[str, Table]) -> Iterator[str]:
    """A type that its source table does not hold with this meaning; a table not given is not compared."""
    table = tables.get(row["code_source"])
    scheme, _, rest = row["type"].partition("^")
    value, _, meaning = rest.partition("^")
    if table is not None and meaning not in table.get((scheme, value), ()):
        known = sorted(table.get((scheme, value), ())) or "nothing"
        yield f"{row['code_source']} knows {scheme} {value} as {known}, not as {meaning!r}"


def shared_triplet_problems(table: Table) -> Iterator[str]:
    """Categories and sides pydicom does not know; it words some categories differently, so values only."""
    for triplet in sorted({*CATEGORIES, *SIDES.values()}):
        scheme, value, _ = triplet.split("^")
        if (scheme, value) not in table:
            yield f"pydicom does not know {triplet}"


def shared_code_problems(rows: list[Row]) -> Iterator[str]:
    """Organs a DICOM segmentation could not tell apart by their code; lesions may share one."""
    users: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in rows:
        if row["kind"] in ("organ", "station"):
            users[row["type"], row["modifier"]].append(row["key"])
    for (code_type, modifier), keys in users.items():
        if len(keys) > 1:
            yield f"{' and '.join(keys)} share the code {code_type} {modifier}".rstrip()


def reference_problems(keys: set[str], sets: dict, mappings: dict) -> Iterator[str]:
    """Keys that sets.json and mappings.json name but the table does not hold."""
    for name, entry in sets.items():
        if len(set(entry["keys"])) < len(entry["keys"]):
            yield f"set {name}: a key appears twice"
        for key in sorted(set(entry["keys"]) - keys):
            yield f"set {name}: unknown key {key}"
    for name, entry in mappings.items():
        for key in sorted(set(entry["labels"].values()) - keys):
            yield f"mapping {name}: unknown key {key}"
    for name in mappings.get("dataset_names", {}).get("labels", {}):
        if name != name.lower():
            yield f"mapping dataset_names: {name!r} is not lower case"


def problems_in(rows: list[Row], sets: dict, mappings: dict, tables: dict[str, Table]) -> list[str]:
    """Every problem of a vocabulary in memory, one sentence each; `tables` are compared with."""
    if not rows or list(rows[0]) != COLUMNS:
        return [f"structures.csv must have the columns {','.join(COLUMNS)}"]
    by_key = {row["key"]: row for row in rows}
    found = [*identity_problems(rows), *shared_code_problems(rows)]
    found.extend(shared_triplet_problems(tables["pydicom"]))
    for row in rows:
        checks = (
            field_problems(row),
            color_and_size_problems(row),
            side_problems(row, by_key),
            triplet_problems(row),
            code_problems(row, tables),
        )
        found.extend(f"{row['key']}: {problem}" for check in checks for problem in check)
    found.extend(reference_problems(set(by_key), sets, mappings))
    return found


def read_folder(folder: Path) -> tuple[list[Row], dict, dict]:
    """The structures, sets and mappings of one Labels folder."""
    sets, mappings = (
        json.loads((folder / name).read_text(encoding="utf-8")) for name in ("sets.json", "mappings.json")
    )
    return read_rows(folder / "structures.csv"), sets, mappings


def main(arguments: list[str] | None = None) -> int:
    """Run the check and return the exit status."""
    parser = argparse.ArgumentParser(description="Check Resources/Labels against code tables and rules.")
    parser.add_argument("--labels", type=Path, default=LABELS, help="folder to check (default: %(default)s)")
    parser.add_argument("--terminology", type=Path, nargs="+", default=[], help="Slicer .term.json files")
    parser.add_argument("--totalsegmentator", type=Path, help="its totalsegmentator_snomed_mapping.csv")
    options = parser.parse_args(arguments)
    tables = {"pydicom": pydicom_table()}
    if options.terminology:
        tables["slicer"] = slicer_table(options.terminology)
    if options.totalsegmentator:
        tables["totalsegmentator"] = totalsegmentator_table(options.totalsegmentator)
    rows, sets, mappings = read_folder(options.labels)
    for source, count in sorted(Counter(row["code_source"] for row in rows).items()):
        state = "compared" if source in tables else "NOT compared: no table given"
        if source == "private":
            state = "this project's own scheme, nothing to compare"
        sys.stdout.write(f"{source}: {count} rows, {state}\n")
    found = problems_in(rows, sets, mappings, tables)
    for problem in found:
        sys.stdout.write(f"{problem}\n")
    sys.stdout.write(f"{len(rows)} structures, {len(found)} problems\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
