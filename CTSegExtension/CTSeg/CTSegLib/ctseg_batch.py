"""A folder of scans without a window:

    Slicer --no-main-window --python-script .../CTSegLib/ctseg_batch.py IN OUT --text "both kidneys"

Opens no dialog. Ends with 0 (all done), 2 (unusable arguments, nothing done) or 5 (some scans failed: each is
named with its error, the others are done). Results that exist are never overwritten.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

FAULT, FAILED = 1, 5
_ENDINGS = (".nii", ".nii.gz", ".nrrd", ".mha", ".mhd")


def main(arguments: Sequence[str]) -> int:
    """Segments every scan of a folder and returns the exit code."""
    from CTSegLogic import (
        Classes,
        CTSegError,
        Everything,
        Request,
        Run,
        Session,
        Text,
        read_image,
        write_segmentation,
    )

    options = _options(arguments)
    scans = _scans(options.source)
    if not scans:
        sys.stderr.write(f"{options.source} holds no scan.\nGive a folder of images or of DICOM folders.\n")
        return 2
    prompt = Everything(options.everything or None)
    if options.text:
        prompt = Text(options.text)
    elif options.structures:
        prompt = Classes(tuple(options.structures.split(",")))
    request, failed = Request(prompt=prompt, card=options.model, quality=options.quality), 0
    session = Session(Run(device=options.device))
    options.target.mkdir(parents=True, exist_ok=True)
    for scan in scans:
        out = options.target / f"{_stem(scan)}.seg.nrrd"
        try:
            if out.exists():
                raise CTSegError(seen=f"{out} exists already.", hint="Remove it, or choose another folder.")
            found = session.segment(read_image(scan, modality=options.modality), request)
            write_segmentation(found, out)
            sys.stdout.write(f"{scan.name}: {sum(e.status == 'found' for e in found.entries)} structures\n")
        except CTSegError as error:
            failed += 1
            sys.stderr.write(f"{scan.name}: {error.seen}\n{error.hint}\n")
    sys.stdout.write(f"{len(scans) - failed} of {len(scans)} done.\n")
    return FAILED if failed else 0


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="ctseg_batch.py", description="Segments every scan of a folder.")
    parser.add_argument("source", type=Path, help="folder of images, or of DICOM folders")
    parser.add_argument("target", type=Path, help="where results go")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--text")
    what.add_argument("--structures", help="keys, comma separated")
    what.add_argument("--everything", nargs="?", const="", help="all organs, or those of a set")
    parser.add_argument("--model")
    parser.add_argument("--modality", default="CT")
    parser.add_argument("--quality", default="balanced", choices=("fast", "balanced", "best"))
    parser.add_argument("--device", default="auto")
    return parser.parse_args(list(arguments))


def _scans(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if p.is_dir() or p.name.lower().endswith(_ENDINGS)]
    return sorted(found)


def _stem(path: Path) -> str:
    name = path.name
    for ending in (".nii.gz", *_ENDINGS):
        if name.lower().endswith(ending):
            return name[: -len(ending)]
    return name


def _find_package() -> None:
    """In a source checkout the package lies at the root; installed, it is on the path already."""
    try:
        import CTSegLogic  # noqa: F401
    except ImportError:
        sys.path.append(str(Path(__file__).resolve().parents[3]))


def _leave(code: int) -> bool:
    """Asks the application to end with this code; False when there is no application."""
    try:
        import slicer

        slicer.util.exit(code)
    except (ImportError, AttributeError):
        return False
    return True


if __name__ == "__main__":
    _find_package()
    code = FAULT
    try:
        code = main(sys.argv[1:])
    except SystemExit as ended:  # argparse: unusable arguments, or --help
        code = int(ended.code or 0)
    finally:  # after a fault too: Slicer would stay open without a window
        asked = _leave(code)
    if not asked:
        sys.exit(code)
