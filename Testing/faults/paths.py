"""Odd names and long ones, and files and folders that may not be written or read."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from faults import judge
from faults.engine import as_nobody, ctseg, run
from faults.jobs import FORMATS, JOBS
from faults.trial import Bench, Ready, Row

NAMES = (
    *("two words", " lead and end ", "böse ü", "日本語の画像", "пациент №1", "héart 🫀", "e\u0301 combined"),
    *(
        "colon:name",
        "C:\\back\\slash",
        "quote'\"s",
        "[glob]*?",
        "per%cent%20",
        "~tilde",
        "$HOME",
        "semi;colon",
    ),
    *("new\nline", "tab\tname", "trailing.", ".hidden", "#hash", "a=b,c", "{stem}", "x" * 200),
)
DEEP = "/".join("d" * 99 for _ in range(3))  # 300 characters
_WHERE = ("segment", "batch", "install", "import", "evaluate")
_TOO_LONG = "y" * 260


def rows(bench: Bench) -> Iterator[Row]:
    """The faults of this family."""
    for name in _WHERE:
        ready = bench.ready(JOBS[name])
        row = Row(f"`{name}` in folders of odd and long names")
        for odd in bench.picked((*NAMES, DEEP), 7, f"paths {name}"):
            place = f"odd-{bench.count}/{odd}"
            (bench.folder / place).parent.mkdir(parents=True)
            prefix = bench.folder / place
            calls = [absolute(ready, call, prefix) for call in (ready.job.arguments, ready.job.again)]
            bench.trial(row, ready, repr(odd), arguments=calls[0], again=calls[1], names=place)
        yield row
    ready = bench.ready(FORMATS["nii.gz"])
    row = Row("scans and results of odd and long names")
    for odd in bench.picked((*NAMES, _TOO_LONG), 16, "names"):
        _named(bench, row, ready, odd)
    yield row
    yield _guarded(bench, ready)


def absolute(ready: Ready, call: Sequence[str], prefix: Path) -> list[str]:
    """A job's command line with every path in it written out from the root."""
    made = []
    for before, word in zip(("", *call), call, strict=False):
        path = before in ("-o", "--report") or (before != "" and (ready.home / word).exists())
        made.append(str(prefix / word) if path else word)
    return made


def _named(bench: Bench, row: Row, ready: Ready, odd: str) -> None:
    """One scan under an odd name, its result under the same."""
    folder = bench.fresh(ready)
    fits = len(odd) < 240
    scan, out = (f"{odd}.nii.gz", f"out/{odd}.seg.nrrd")
    scan = scan.replace("/", "-")
    if fits:
        shutil.copy2(folder / "scan.nii.gz", folder / scan)
    words = {"scan.nii.gz": f"./{scan}", "out/o.seg.nrrd": out}
    ended = run(folder, ctseg(*(words.get(word, word) for word in ready.job.arguments)))
    troubles = judge.spoken(ended)
    if fits:
        if ended.code:
            troubles.append(f"it ends with {ended.code}: {ended.err[-300:]}")
        elif judge.meaning(folder / out) != ready.goal["out/o.seg.nrrd"]:
            troubles.append("its result differs")
    elif ended.code != 2:
        troubles.append(f"a name that no disk takes ends with {ended.code}")
    now = judge.bytes_of(folder)
    troubles += [f"{name} was changed" for name, old in ready.before.items() if now.get(name) != old]
    row.add(judge.outcome_of(ended), troubles, repr(odd))
    shutil.rmtree(folder)


def _mode(name: str, mode: int) -> Callable[[Path], None]:
    """Gives one file or folder these permissions."""

    def change(folder: Path) -> None:
        (folder / name).chmod(mode)

    return change


# What may not be done, and the exit codes that are right then.
_GUARDS: tuple[tuple[str, str, int, tuple[int, ...]], ...] = (
    ("segment nii.gz", "out", 0o555, (2,)),
    ("segment nii.gz", "out", 0o000, (2,)),
    ("segment nii.gz", "scan.nii.gz", 0o444, (0,)),
    ("segment nii.gz", "scan.nii.gz", 0o000, (2,)),
    ("segment nii.gz", "tiny", 0o555, (0,)),
    ("segment nii.gz", "tiny/livers.safetensors", 0o444, (0,)),
    ("segment nii.gz", "tiny/livers.safetensors", 0o000, (2, 3)),
    ("segment nii.gz", "tiny/card.json", 0o000, (2,)),
    ("segment nii.gz", "home", 0o555, (0,)),
    ("segment nii.gz", "", 0o555, (0,)),
    ("batch", "out", 0o555, (2,)),
    ("batch", "in", 0o555, (0,)),
    ("batch", "in/c.nii.gz", 0o000, (5,)),
    ("batch", "out/precious.txt", 0o444, (0,)),
    ("train", "", 0o555, (2,)),
    ("train", "task.json", 0o000, (2,)),
    ("train", "Balls", 0o555, (0,)),
    ("train", "Balls/labelsTr/c1.nii.gz", 0o000, (2,)),
    ("train", "tiny/encoder.safetensors", 0o444, (0,)),
    ("install", "home", 0o555, (2,)),
    ("install", "shop", 0o555, (0,)),
    ("install", "shop/livers.safetensors", 0o000, (2, 3)),
    ("install", "remote.json", 0o000, (2,)),
    ("import", "", 0o555, (2,)),
    ("import", "trained", 0o555, (0,)),
    ("import", "trained/fold_0/checkpoint_final.pth", 0o000, (2, 3)),
    ("evaluate", "ev", 0o555, (2,)),
    ("evaluate", "pred/c1.nii.gz", 0o000, (2,)),
    ("evaluate", "ev/evaluation.csv", 0o444, (0,)),
)


def _guarded(bench: Bench, ready: Ready) -> Row:
    """Permissions, as a user without an administrator's rights."""
    row = Row("files and folders that may not be written or read (not as root)")
    for name, what, mode, right in bench.picked(_GUARDS, len(_GUARDS), "guards"):
        ready = bench.ready({**JOBS, "segment nii.gz": FORMATS["nii.gz"]}[name])
        folder = bench.fresh(ready)
        for path in (folder, *folder.rglob("*")):
            path.chmod(path.stat().st_mode | 0o666 | (0o111 if path.is_dir() else 0))
        place = folder / what
        kept = place.stat().st_mode
        place.chmod(mode)
        ended = run(folder, ctseg(*ready.job.arguments), inject=as_nobody)
        place.chmod(kept)
        troubles = judge.spoken(ended) + judge.whole(ready.job, folder, ready.before, ready.goal)
        if ended.code not in right:
            troubles.append(f"exit code {ended.code} instead of {right}: {ended.err[-300:]}")
        for path in folder.rglob("*"):
            if os.getuid() == 0:
                os.chown(path, 0, 0)
        repeated = run(folder, ctseg(*ready.job.again))
        if repeated.code:
            troubles.append(f"repeated, it ends with {repeated.code}: {repeated.err[-300:]}")
        troubles += judge.reached(folder, ready.before, ready.goal, ready.job)
        row.add(judge.outcome_of(ended), troubles, f"{name}: {what or '.'} {mode:03o}")
        shutil.rmtree(folder)
    return row
