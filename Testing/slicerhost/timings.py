"""How long the panel takes: `python -m slicerhost timings [--model NAME]` prints JSON.

open_ms                 loading the module and opening its panel, after the host has started
first_start_s           from Apply to the first work on the scan: process, libraries, model
second_start_s          the same for the second Apply, with everything warm
first_run_s             from Apply to the result in the scene; second_run_s likewise
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from slicerhost import boot

MODULE = Path(__file__).resolve().parents[2] / "CTSegExtension" / "CTSeg" / "CTSeg.py"
_TIMEOUT_S = 600.0
_BEFORE_WORK = ("Starting", "Loading")


def opened() -> tuple[Any, float]:
    """The open panel's widgets, and how many ms it took."""
    from slicerhost.modules import load_scripted_module

    app = boot.start()
    began = time.perf_counter()
    load_scripted_module(MODULE)
    ui = app.moduleManager().enter("CTSeg").ui
    app.processEvents()
    return ui, 1000 * (time.perf_counter() - began)


def applied(ui: Any) -> tuple[float, float]:
    """Seconds from a click on Apply to the first work on the scan, and to the result."""
    from slicerhost.support import click, wait_until

    began = time.perf_counter()
    click(ui.applyButton)
    wait_until(lambda: not ui.statusLabel.text.startswith(_BEFORE_WORK), _TIMEOUT_S, "the start")
    started = time.perf_counter() - began
    wait_until(lambda: ui.applyButton.text == "Apply", _TIMEOUT_S, "the end of the run")
    return started, time.perf_counter() - began


def main(arguments: list[str]) -> int:
    """Measures and prints; 1 when a run failed."""
    parser = argparse.ArgumentParser(prog="slicerhost timings")
    parser.add_argument("--model", help="a model's name; starter, or body where it is not installed")
    wanted = parser.parse_args(arguments).model
    ui, open_ms = opened()
    import CTSeg
    import slicer

    from slicerhost.support import pick

    volume = CTSeg.loadAverageHeadNeck()
    pick(ui.inputSelector, volume.GetName())
    names = [ui.modelBox.itemData(n) for n in range(ui.modelBox.count)]
    name = wanted or ("starter" if "starter" in names else "body")
    pick(ui.modelBox, ui.modelBox.itemText(names.index(name)))
    (first_start, first_run), (second_start, second_run) = applied(ui), applied(ui)
    figures = {
        "model": name,
        "open_ms": round(open_ms),
        "first_start_s": round(first_start, 3),
        "second_start_s": round(second_start, 3),
        "first_run_s": round(first_run, 3),
        "second_run_s": round(second_run, 3),
    }
    sys.stdout.write(json.dumps(figures, indent=1) + "\n")
    slicer.modules.CTSegWidget.logic.stop()
    return int("structure" not in ui.statusLabel.text)
