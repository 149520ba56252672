"""What each command of `ctseg` does; parsing and error lines are in cli.py."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from CTSegLogic.app.asked import mask_on, prompt_of, region
from CTSegLogic.files.images import read_image, stem
from CTSegLogic.files.segfile import outputs_of, write_segmentation
from CTSegLogic.files.weights import accepted, cards, find_card, installed, publish
from CTSegLogic.files.weights import install as install_files
from CTSegLogic.files.weights import remove as remove_files
from CTSegLogic.values.card import Card
from CTSegLogic.values.errors import OutputRefused, PromptUnknown
from CTSegLogic.values.language import understand
from CTSegLogic.values.prediction import Prediction
from CTSegLogic.values.resources import resource
from CTSegLogic.values.run import Request, Run
from CTSegLogic.values.structures import foreign_labels, structure_sets, vocabulary
from CTSegLogic.values.volume import Volume

STARTER = "starter"
SAMPLE = ("Samples", "average-head-neck-ct.nii.gz")


def version() -> str:
    """The version of this package."""
    try:
        return metadata.version("ctseg")
    except metadata.PackageNotFoundError:
        return "0 (not installed by pip)"


def list_(options: argparse.Namespace, run: Run) -> None:
    """Prints models, structures or sets."""
    del run
    tables = {"models": _models, "structures": lambda: _structures(options.search), "sets": _sets}
    rows = tables[options.what]()
    if options.json:
        _say(rows)
    else:
        _say_rows(rows)


def describe(options: argparse.Namespace, run: Run) -> None:
    """Prints a card for people, or as it is."""
    del run
    card = find_card(options.card)
    if options.json:
        sys.stdout.write(card.to_json())
        return
    use = {"any": "any use", "research": "RESEARCH USE ONLY", "non-commercial": "NON-COMMERCIAL USE ONLY"}[
        card.license.use
    ]
    lines = [f"{card.name} {card.version}: {card.title}", f"licence: {card.license.name}, {use}"]
    lines += [card.license.text] if card.license.text else []
    spacing = " x ".join(f"{s:g}" for s in card.prepare.spacing_mm)
    lines.append(f"for: {' and '.join(card.modality)}; works at {spacing} mm (k, j, i)")
    for head in card.heads:
        lines.append(f"head {head.name}: {', '.join(head.structures)}")
        lines += [f"    {what}: {_plain(value)}" for what, value in head.measured.items()]
    lines += [f"label {n} {key}: {card.trained_on.get(key, 'a group')}" for key, n in card.labels.items()]
    for name, spec in card.files.items():
        checksum = spec.sha256 or "checksum not known; recorded at first install"
        lines.append(f"file {name}: {spec.bytes or '?'} bytes, sha256 {checksum}")
    for title, sentences in (("data", card.data), ("limits", card.limits), ("cite", card.cite)):
        lines += [f"{title}: {sentence}" for sentence in sentences]
    sys.stdout.write("\n".join(lines) + "\n")


def explain(options: argparse.Namespace, run: Run) -> int:
    """Prints what a phrase means; exit code 2 when a word was not understood."""
    del run
    phrase = " ".join(options.phrase)
    card = find_card(options.model) if options.model else None
    meant = understand(phrase, card.vocabulary if card else None, within=card.keys if card else None)
    serving = {
        c.name: [k for k in c.spread(meant.wanted) if k in c.keys]
        for c in ([card] if card else cards().values())
    }
    serving = {name: keys for name, keys in serving.items() if keys}
    if options.json:
        _say({**meant.to_json(), "models": serving})
        return 0 if meant.clear else 2
    lines = []
    for match in meant.matches:
        note = f"  ({match.note})" if match.note else ""
        lines.append(f"{'not ' if match.excluded else ''}{match.words!r}: {', '.join(match.keys)}{note}")
    lines += ["everything the model has"] if meant.everything else []
    lines += [
        f"not understood: {word!r}; nearest: {', '.join(near) or 'none'}"
        for word, near in meant.unknown.items()
    ]
    lines += [f"may mean several: {word!r}: {', '.join(keys)}" for word, keys in meant.ambiguous.items()]
    lines += [f"model {name} finds: {', '.join(keys)}" for name, keys in serving.items()]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0 if meant.clear else 2


def doctor(options: argparse.Namespace, run: Run) -> int:
    """Prints versions, devices, models and a self-test; exit code 3 when something is wrong."""
    from CTSegLogic.app.doctor import examine

    table = examine(run)
    if options.json:
        _say(table)
    else:
        for part, entries in table.items():
            sys.stdout.write(f"{part}\n" + "".join(f"    {k}: {_plain(v)}\n" for k, v in entries.items()))
    return 0 if not table["problems"] else 3


def install(options: argparse.Namespace, run: Run) -> None:
    """Installs a model and prints the SHA-256 of each file."""
    card = find_card(options.card)
    sums = install_files(
        card, source=options.source, accept_license=options.accept_license, progress=run.progress
    )
    for name, checksum in sums.items():
        known = "as its card says" if card.files[name].sha256 else "not known before: recorded"
        sys.stdout.write(f"{name}: sha256 {checksum} ({known})\n")
    sys.stdout.write(f"{card.name} is ready.\n")


def remove(options: argparse.Namespace, run: Run) -> None:
    """Removes a model's files and prints what that freed."""
    del run
    freed = remove_files(find_card(options.card))
    sys.stdout.write(f"{freed / 1e6:.1f} MB freed.\n")


def segment(options: argparse.Namespace, run: Run) -> None:
    """Segments one scan and writes what was asked for; nothing is written when anything fails before."""
    looks = [p for p in (options.preview, options.report) if p is not None]
    _refuse_trouble([*outputs_of(options.output), *looks], options.overwrite)
    volume, prediction = _segmented(options, run)
    written = write_segmentation(prediction, options.output, volume=volume, naming=options.naming)
    for note in written.notes:
        sys.stderr.write(f"Warning: {note}\n")
    _write_looks(prediction, volume, options.preview, options.report)
    _say_result(prediction, volume, options.json)


def demo(options: argparse.Namespace, run: Run) -> None:
    """Segments the shipped sample, or a scan given, and writes result, picture and report into one folder."""
    options.images = options.images or [resource(*SAMPLE)]
    asked = (options.text, options.structures, options.labels, options.points, options.everything)
    if options.model is None and all(part is None for part in asked):
        options.model = STARTER
    folder: Path = options.output
    files = [folder / f"{stem(options.images[0])}{e}" for e in (".seg.nrrd", ".png", ".json")]
    folder.mkdir(parents=True, exist_ok=True)
    _refuse_trouble(files, options.overwrite)
    volume, prediction = _segmented(options, run)
    write_segmentation(prediction, files[0])
    _write_looks(prediction, volume, files[1], files[2])
    _say_result(prediction, volume, False)
    sys.stdout.write("Written: " + ", ".join(str(f) for f in files) + "\n")


def evaluate(options: argparse.Namespace, run: Run) -> None:
    """Prints how well files, or a model on a data set's test scans, agree with truth."""
    from CTSegLogic.app.evaluate import as_text, evaluate_files, evaluate_model, summary, write_results
    from CTSegLogic.app.session import Session

    tables = [options.output / f"evaluation{e}" for e in (".csv", ".json")] if options.output else []
    for folder in [options.output] if options.output else []:
        folder.mkdir(parents=True, exist_ok=True)
    _refuse_trouble([*tables, *([options.csv] if options.csv else [])], options.overwrite)
    mapping = _mapping(options.mapping)
    found = Path(options.found)
    if found.exists() and not (found / "card.json").is_file():
        numbers = {int(k): v for k, v in mapping.items()} if mapping else None
        rows = list(evaluate_files(found, options.truth, numbers))
    else:
        card = find_card(options.found)
        rows = list(
            evaluate_model(
                Session(run), options.found, options.truth, quality=options.quality, mapping=mapping
            )
        )
        sys.stderr.write(f"{card.name} {card.version} on {options.truth.name}, quality {options.quality}\n")
    write_results(rows, options.output, options.csv)
    if options.json:
        _say(summary(rows))
    else:
        sys.stdout.write(as_text(rows) + "\n")


def train(options: argparse.Namespace, run: Run) -> None:
    """Trains the head of a task file."""
    from CTSegLogic.train.grow import grow

    card = grow(options.task, options.output, run, data=options.data, resume=options.resume)
    sys.stdout.write(
        f"{card.name} {card.version}: heads {', '.join(h.name for h in card.heads)} in {options.output}\n"
    )
    if options.publish:
        published = publish(options.output)
        sys.stdout.write(f"Published as {published.name}.\n")


def worker(options: argparse.Namespace, run: Run) -> int:
    """Serves the panel; see app/worker.py."""
    from CTSegLogic.app.worker import serve

    return serve(run, idle_s=options.idle)


def _segmented(options: argparse.Namespace, run: Run) -> tuple[Volume, Prediction]:
    from CTSegLogic.app.session import Session

    session = Session(run)
    request = Request(
        prompt=prompt_of(options),
        card=options.model,
        quality=options.quality,
        roi=region(options.roi) if options.roi else None,
    )
    plan = session.plan(request)
    modality = options.modality or plan[0][0].modality[0]
    channels = max(len(card.prepare.channels) for card, _ in plan)
    volume = read_image(options.images, modality=modality, channels=channels, series=options.series)
    if options.prior is not None:
        request = replace(request, before=mask_on(options.prior, volume.grid))
    return volume, session.segment(volume, request)


def _write_looks(prediction: Prediction, volume: Volume, preview: Path | None, report: Path | None) -> None:
    from CTSegLogic.app.report import write_preview, write_report

    if preview is not None:
        write_preview(prediction, volume, preview)
    if report is not None:
        write_report(prediction, volume, report)


def _say_result(prediction: Prediction, volume: Volume, as_json: bool) -> None:
    from CTSegLogic.app.report import as_table, as_text

    if as_json:
        _say(as_table(prediction, volume))
    else:
        sys.stdout.write(as_text(prediction, volume) + "\n")


def _refuse_trouble(outputs: list[Path], overwrite: bool) -> None:
    """Finds out before an hour of work that the result could not be written."""
    if len(set(outputs)) < len(outputs):
        raise OutputRefused(
            seen="Two outputs have the same name (a .nii.gz writes its legend as .json beside it).",
            hint="Give each its own name.",
        )
    for path in outputs:
        if not path.parent.is_dir():
            raise OutputRefused(
                seen=f"The folder {path.parent} does not exist.",
                hint="Create it first, or choose another output.",
            )
        if path.exists() and not overwrite:
            raise OutputRefused(
                seen=f"{path} exists already.", hint="Choose another name, or add --overwrite."
            )


def _mapping(text: str | None) -> Mapping[str, str] | None:
    if text is None:
        return None
    if text.lstrip().startswith("{"):
        try:
            table = json.loads(text)
        except ValueError as error:
            raise PromptUnknown(
                seen=f"--mapping is no JSON: {error}.", hint='Write {"1": "liver"} or a mapping\'s name.'
            ) from error
        return {str(k): str(v) for k, v in table.items()}
    return foreign_labels(text)


def _models() -> list[dict[str, Any]]:
    return [
        {
            "name": card.name,
            "version": card.version,
            "modality": "|".join(card.modality),
            "structures": len(card.keys),
            "licence": card.license.name,
            "use": card.license.use,
            "state": _state(card),
            "title": card.title,
        }
        for card in cards().values()
    ]


def _state(card: Card) -> str:
    if not installed(card):
        return "not installed"
    if card.license.ask and not accepted(card):
        return "licence not accepted"
    return "ready"


def _structures(search: str | None) -> list[dict[str, Any]]:
    words = (search or "").lower()
    served: dict[str, list[str]] = {}
    for card in cards().values():
        for key in card.keys:
            served.setdefault(key, []).append(card.name)
    return [
        {
            "key": s.key,
            "name": s.name,
            "kind": s.kind,
            "region": s.region,
            "modality": "|".join(s.modality),
            "tg263": s.tg263,
            "code": str(s.code),
            "models": "|".join(served.get(s.key, [])),
        }
        for s in vocabulary().values()
        if words in s.search_text
    ]


def _sets() -> list[dict[str, Any]]:
    return [
        {"name": name, "count": len(keys), "keys": ", ".join(keys)} for name, keys in structure_sets().items()
    ]


def _say(table: Any) -> None:
    sys.stdout.write(json.dumps(table, indent=1, ensure_ascii=False) + "\n")


def _say_rows(rows: list[dict[str, Any]]) -> None:
    """Columns under their names; the last one may be long."""
    table = [list(rows[0]), *([str(v) for v in row.values()] for row in rows)] if rows else []
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        sys.stdout.write("  ".join(cells).rstrip() + "\n")


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_plain(v) for v in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
