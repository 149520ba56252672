"""The command line `ctseg`: results on stdout, progress on stderr, errors in two lines, documented exit
codes.

0 done, 2 unusable input or arguments, 3 weights missing or damaged, 4 out of memory, 5 partly done, 130
cancelled.
"""

from __future__ import annotations

import argparse
import logging
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from CTSegLogic.app import commands, explain, segmenting, teaching
from CTSegLogic.app.asked import overrides_of
from CTSegLogic.app.batch import add_batch, batch
from CTSegLogic.app.ending import told
from CTSegLogic.app.flare import add_flare
from CTSegLogic.app.importing import add_import, import_
from CTSegLogic.app.lessons import add_lessons
from CTSegLogic.app.rounds import add_rounds
from CTSegLogic.app.terminal import interruptible, speak_plainly
from CTSegLogic.values.errors import Cancelled, CTSegError
from CTSegLogic.values.presets import PRESETS
from CTSegLogic.values.run import PRECISIONS, Run

_MAIN = "Segments CT (and MR) by name, by text or everything, and learns new structures. Research use only."
_NAMING = ("name", "snomed", "totalsegmentator", "tg263")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code."""
    options = parser().parse_args(arguments)
    for library in ("pydicom", "highdicom", "nibabel"):  # their remarks on headers are for programmers
        logging.getLogger(library).setLevel(logging.ERROR)
    speak_plainly()
    try:
        with interruptible(options.command) as stop:
            return int(options.run(options, _run_of(options, stop)) or 0)
    except (CTSegError, OSError, RuntimeError, MemoryError) as error:
        return told(error, options.debug)
    except KeyboardInterrupt:
        return Cancelled.exit_code


def parser() -> argparse.ArgumentParser:
    """The whole command line; tests hold it against README and the contract."""
    top = argparse.ArgumentParser(prog="ctseg", description=_MAIN)
    top.add_argument("--version", action="version", version=f"ctseg {commands.version()}")
    sub = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _catalogue(sub)
    _models(sub)
    _segment(sub)
    _demo(sub)
    _batch(sub)
    _evaluate(sub)
    _train(sub)
    _prepare(sub)
    _worker(sub)
    for command in sub.choices.values():
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return top


def _catalogue(sub: Any) -> None:
    p = sub.add_parser("list", help="models, structures or sets")
    p.add_argument("what", nargs="?", choices=("models", "structures", "sets"), default="models")
    p.add_argument(
        "--search", metavar="WORD", help="structures whose names, aliases, region or groups hold WORD"
    )
    p.add_argument("--json", action="store_true", help="for programs")
    p.set_defaults(run=commands.list_)
    p = sub.add_parser("describe", help="what a model finds, needs and may be used for")
    p.add_argument("card", metavar="CARD", help="a model's name, or its card file or folder")
    p.add_argument("--json", action="store_true", help="the card itself")
    p.set_defaults(run=commands.describe)
    p = sub.add_parser("explain", help="what a phrase means, word by word")
    p.add_argument(
        "phrase", metavar="PHRASE", nargs="+", help='such as "both parotids and the cord, not the mandible"'
    )
    p.add_argument("--model", metavar="CARD", help="read the phrase for this model")
    p.add_argument("--modality", choices=("CT", "MR"), help="the kind of scan the model is to be chosen for")
    p.add_argument("--pathways", action="store_true", help="the way of each structure through a gCIS model")
    p.add_argument("--json", action="store_true", help="for programs")
    p.set_defaults(run=explain.explain)
    p = sub.add_parser("doctor", help="versions, devices, models and a self-test")
    p.add_argument("--json", action="store_true", help="for programs")
    p.add_argument(
        "--tune", action="store_true", help="measure how this computer runs networks fastest, and keep it"
    )
    p.set_defaults(run=commands.doctor)


def _models(sub: Any) -> None:
    p = sub.add_parser("install", help="download a model's files, or take them from a file or folder")
    p.add_argument("card", metavar="CARD")
    p.add_argument(
        "--from", dest="source", type=Path, metavar="FILE_OR_DIR", help="install without a network"
    )
    p.add_argument("--accept-license", action="store_true", help="I have read the licence and agree")
    p.set_defaults(run=commands.install)
    p = sub.add_parser("import", help="make a model of what CL-Net, nnU-Net or EfficientSegmentation trained")
    add_import(p)
    p.set_defaults(run=import_)
    p = sub.add_parser("remove", help="delete a model's downloaded files")
    p.add_argument("card", metavar="CARD")
    p.set_defaults(run=commands.remove)


def _asked(p: argparse.ArgumentParser, *, one_scan: bool = True) -> None:
    """What to segment and how: shared by every command that segments; clicks and regions are of one scan."""
    p.add_argument(
        "--model", metavar="CARD", help="a model's name, card file or folder (default: the one that serves)"
    )
    what = p.add_mutually_exclusive_group()
    what.add_argument("--structures", metavar="A,B", help="keys, see `ctseg list structures`")
    what.add_argument("--labels", metavar="3,5", help="the publisher's numbers of the named --model")
    what.add_argument(
        "--heads-from", type=Path, metavar="FILE.json", help="heads of --model named in a CL-Net file"
    )
    what.add_argument("--text", metavar="PHRASE", help='such as "both parotids and the spinal cord"')
    what.add_argument(
        "--everything", metavar="SET", nargs="?", const="", help="all organs, or those of a set"
    )
    p.add_argument("--quality", choices=("fast", "balanced", "best"), default="balanced")
    p.add_argument("--modality", choices=("CT", "MR"), help="of files that do not say (default: the model's)")
    p.add_argument("--locate", metavar="CARD", help="look only where this model finds something")
    p.add_argument("--refine", metavar="CARD", help="this model draws again what was found")
    p.set_defaults(points=None, prior=None, roi=None, series=None)
    if one_scan:
        what.add_argument("--points", type=Path, metavar="FILE.json", help="clicks, RAS mm, or .mrk.json")
        p.add_argument("--prior", type=Path, metavar="SEG", help="a mask that --points correct")
        p.add_argument(
            "--roi", type=Path, metavar="FILE", help="label map; only the box around it is looked at"
        )
        p.add_argument(
            "--series", metavar="UID", help="which series of a DICOM folder (its UID or the end of it)"
        )
    _brain(p, one_scan)
    _tiles(p)
    _runtime(p, threads="--workers" if one_scan else "--threads")


def _brain(p: argparse.ArgumentParser, one_scan: bool) -> None:
    """The way of a brain MR through a template."""
    p.add_argument(
        "--template", type=Path, metavar="FILE", help="stripped brain: MR is segmented in its space"
    )
    p.add_argument(
        "--skull-strip", default="auto", metavar="auto|none|hd-bet|FILE", help="FILE: SynthStrip's weights"
    )
    p.set_defaults(brain_mask=None, keep_stages=None)
    if one_scan:
        p.add_argument("--brain-mask", type=Path, metavar="FILE", help="where the brain is, for --template")
        p.add_argument("--keep-stages", type=Path, metavar="DIR", help="what each step of --template made")


def _tiles(p: argparse.ArgumentParser) -> None:
    """How tiles cover a scan, against what the model's card says."""
    p.add_argument(
        "--window",
        metavar="K,J,I",
        help="voxels of a tile along the working grid's axes (R,A,S in multiples of 16 for vista3d and ctmr, "
        "k,j,i for others), or one number for a cube",
    )
    p.add_argument("--overlap", type=float, metavar="X", help="share that neighbouring tiles repeat, 0..0.9")
    p.add_argument("--blend", choices=("gaussian", "constant"), help="weights of a tile's voxels")
    p.add_argument(
        "--postprocess",
        choices=("cpu", "device"),
        help="where tiles are blended and labels made (default: the device while its memory suffices)",
    )
    p.add_argument(
        "--keep-features",
        type=Path,
        metavar="DIR",
        help="vista3d, ctmr: keep a scan's features there; other structures then need no network",
    )
    p.add_argument(
        "--keep-features-gib", type=float, default=20.0, metavar="GIB", help="most that DIR may hold"
    )
    p.add_argument("--planes", metavar="X|Y|Z|A", help="rstn: from where it looks (default: its card's)")
    p.add_argument("--no-merge", action="store_true", help="keep every head's own answer where heads meet")
    p.add_argument(
        "--host-mm", type=float, metavar="MM", help="drop lesions further than this from their organ"
    )
    p.add_argument(
        "--no-body-part",
        dest="body_part",
        action="store_false",
        help="every head looks at the whole scan, wherever in the body it lies",
    )


def _runtime(p: argparse.ArgumentParser, threads: str = "--workers") -> None:
    p.add_argument("--device", default="auto", metavar="DEVICE", help="auto, cpu, cuda, cuda:1, mps")
    p.add_argument("--precision", choices=PRECISIONS, default="auto")
    p.add_argument(
        "--backend",
        choices=("auto", "torch", "openvino", "tensorrt"),
        default="torch",
        help="what runs the network; believed only where its labels agree with torch's",
    )
    p.add_argument("--memory", type=float, metavar="GIB", help="most memory to plan for")
    p.add_argument(threads, dest="workers", type=int, default=2, metavar="N", help="threads for resampling")


def _segment(sub: Any) -> None:
    p = sub.add_parser("segment", help="segment one scan")
    p.add_argument(
        "images", metavar="IMAGE", nargs="+", type=Path, help="file or DICOM folder; one per channel"
    )
    p.add_argument(
        "-o", "--output", type=Path, required=True, metavar="OUT", help=".seg.nrrd .nii.gz .seg.dcm .rt.dcm"
    )
    p.add_argument("--naming", choices=_NAMING, default="name")
    segmenting.add_looks(p)
    p.add_argument(
        "--per-head", type=Path, metavar="DIR", help="also one label map per head, before they are merged"
    )
    p.add_argument(
        "--devices", dest="head_devices", metavar="A,B", help="share the heads out, such as cuda:0,cuda:1"
    )
    p.add_argument("--overwrite", action="store_true", help="replace files that exist")
    p.add_argument("--json", action="store_true", help="the report on stdout instead of the table")
    _asked(p)
    p.set_defaults(run=segmenting.segment)


def _demo(sub: Any) -> None:
    p = sub.add_parser("demo", help="segment the sample (or IMAGE) and write result, picture and report")
    p.add_argument("images", metavar="IMAGE", nargs="*", type=Path)
    p.add_argument(
        "-o", "--output", type=Path, default=Path("ctseg-demo"), metavar="DIR", help="default: ctseg-demo"
    )
    p.add_argument("--overwrite", action="store_true", help="replace files that exist")
    _asked(p)
    p.set_defaults(run=segmenting.demo)


def _batch(sub: Any) -> None:
    p = sub.add_parser("batch", help="segment every scan of a folder, with a table of what became of each")
    add_batch(p)
    p.add_argument("--naming", choices=_NAMING, default="name")
    p.add_argument("--overwrite", action="store_true", help="replace files that exist")
    p.add_argument("--json", action="store_true", help="every scan on stdout, for programs")
    _asked(p, one_scan=False)
    p.set_defaults(run=batch)


def _evaluate(sub: Any) -> None:
    p = sub.add_parser(
        "evaluate", help="Dice, surface Dice and HD95 of files, folders or a model against truth"
    )
    p.add_argument("found", metavar="PRED", help="segmentation, folder of them, or a model's name")
    p.add_argument(
        "truth", metavar="TRUTH", type=Path, help="segmentation, folder, or (for a model) nnU-Net data set"
    )
    p.add_argument("-o", "--output", type=Path, metavar="DIR", help="evaluation.csv, .json and -summary.csv")
    p.add_argument("--csv", type=Path, metavar="FILE", help="one row per case and structure")
    p.add_argument(
        "--mapping",
        metavar="NAME_OR_JSON",
        help="label values to keys (default: from the data set); each then counts in every case",
    )
    p.add_argument(
        "--tolerance", type=float, default=3.0, metavar="MM", help="of surface Dice (default: 3 mm)"
    )
    p.add_argument("--processes", type=int, metavar="N", help="cases are dealt to N processes")
    p.add_argument("--devices", metavar="A,B", help="of a model: a process on each, such as cuda:0,cuda:1")
    p.add_argument("--json", action="store_true", help="the summary for programs")
    p.add_argument("--clicks", metavar="1,3,5", help="how good a model is after so many simulated clicks")
    p.add_argument(
        "--continual",
        action="store_true",
        help="PRED is a trained sequence of tasks, TRUTH the folder of their data sets",
    )
    add_rounds(p)
    add_flare(p)
    p.add_argument("--overwrite", action="store_true", help="replace files that exist")
    p.add_argument("--quality", choices=("fast", "balanced", "best"), default="balanced")
    _runtime(p)
    p.set_defaults(run=teaching.evaluate)


def _train(sub: Any) -> None:
    p = sub.add_parser("train", help="teach a model a new head; what it knew stays as it is")
    p.add_argument("task", metavar="TASK.json", type=Path, help="a task, or a file in CL-Net's grammar")
    p.add_argument("-o", "--output", type=Path, metavar="DIR", help="checkpoints, record and the new card")
    add_lessons(p)
    p.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder of the data sets (default: nnUNet_raw and the like, or beside the task)",
    )
    p.add_argument("--resume", action="store_true", help="go on after the last whole epoch")
    p.add_argument("--publish", action="store_true", help="make the result a model known by name")
    p.add_argument(
        "--report", action="store_true", help="validation Dice beside the model before: report.json"
    )
    p.add_argument("--devices", type=int, default=1, metavar="N", help="processes that share each batch")
    _runtime(p)
    p.set_defaults(run=teaching.train)


def _prepare(sub: Any) -> None:
    p = sub.add_parser("prepare", help="plan a data set, prepare its cases for training, deal them to folds")
    p.add_argument("dataset", metavar="DATASET_DIR", type=Path, help="folder, name, number, or TASK.json")
    p.add_argument("--data", type=Path, metavar="DIR", help="of a task: where its data sets lie")
    p.add_argument("-o", "--output", type=Path, metavar="LIST.json", help="write a data list with folds")
    p.add_argument("--folds", type=int, default=5, metavar="N", help="of the list: fold 0 validates")
    p.add_argument("--seed", type=int, default=0, help="of the shuffling")
    p.add_argument("--overwrite", action="store_true", help="replace the list")
    p.add_argument("--cache", type=Path, metavar="DIR", help="write plan, fingerprint and prepared cases")
    p.add_argument("--model", metavar="CARD", help="prepare for this model's grid instead of the planned one")
    p.add_argument("--mapping", metavar="NAME_OR_JSON", help="label values to keys (default: dataset.json)")
    p.add_argument(
        "--preset", choices=[n for n in PRESETS if n != "model"], help="whose patch is planned for"
    )
    p.add_argument("--processes", type=int, default=1, metavar="N", help="cases are dealt to N processes")
    p.set_defaults(run=teaching.prepare)


def _worker(sub: Any) -> None:
    p = sub.add_parser("worker", help="answer the panel's requests on stdin until it closes (not for people)")
    p.add_argument("--idle", type=float, default=600.0, metavar="SECONDS", help="let models go after so long")
    _runtime(p)
    p.set_defaults(run=commands.worker)


def _run_of(options: argparse.Namespace, stop: threading.Event) -> Run:
    named = (getattr(options, "head_devices", None) or "").split(",")
    devices = tuple(name.strip() for name in named if name.strip())
    return Run(
        device=devices[0] if len(devices) == 1 else getattr(options, "device", "auto"),
        precision=getattr(options, "precision", "auto"),
        backend=getattr(options, "backend", "torch"),
        memory_gib=getattr(options, "memory", None),
        workers=getattr(options, "workers", 2),
        overrides=overrides_of(options),
        devices=devices if len(devices) > 1 else (),
        progress=Bar(sys.stderr),
        cancelled=stop.is_set,
    )


class Bar:
    """Progress on stderr: one moving line on a terminal, a line per tenth elsewhere."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.terminal = stream, stream.isatty()
        self.last = ""

    def __call__(self, fraction: float, text: str) -> None:
        """Shows a fraction 0..1 and a stage's name."""
        percent = int(100 * min(max(fraction, 0.0), 1.0))
        stage, _, rest = text.partition(",")
        key = f"{percent:3d} % {text}" if self.terminal else f"{percent - percent % 10:3d} % {stage}"
        if key == self.last:
            return
        self.last = key
        left = rest.rpartition(",")[2]
        said = key if self.terminal or not left.endswith(" left") else f"{key},{left}"
        if self.terminal:
            self.stream.write(f"\r\x1b[K{said}" + ("\n" if percent == 100 else ""))
        else:
            self.stream.write(said + "\n")
        self.stream.flush()
