"""Hostile input made by hypothesis (structures) and atheris (guided by coverage); part of `make verify`."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
from fuzz.coverage import PLACES

from CTSegLogic.files.images import read_image
from CTSegLogic.files.points import read_points
from CTSegLogic.files.wire import read_job, read_result
from CTSegLogic.train.grow import read_task, task_of
from CTSegLogic.values.card import card_from
from CTSegLogic.values.errors import CTSegError
from CTSegLogic.values.language import understand
from CTSegLogic.values.prompt import Points

ROOT = Path(__file__).resolve().parents[2]
RUNS = 1500  # of atheris, per family

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def given():
    """hypothesis's `given` with the same examples each time, and its strategies."""
    hypothesis = pytest.importorskip("hypothesis", reason="installed by `make verify`")
    checks = hypothesis.HealthCheck
    settings = hypothesis.settings(
        max_examples=400,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[checks.function_scoped_fixture, checks.too_slow, checks.data_too_large],
    )
    return lambda *strategies: lambda test: settings(hypothesis.given(*strategies)(test))


def values():
    """Anything JSON can hold."""
    from hypothesis import strategies as st

    plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30)
    return st.recursive(plain, lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(), v, max_size=4))


def changes(table):
    """A table with some of its values replaced, at its top or one below."""
    from hypothesis import strategies as st

    keys = st.sampled_from(sorted(table))
    return st.dictionaries(keys, values(), min_size=1, max_size=3).map(lambda new: {**table, **new})


def read_or_refused(read):
    """Runs a reader; what it raises must be two plain lines."""
    try:
        return read()
    except CTSegError as error:
        refused = error
    assert refused.seen.isprintable()
    assert refused.hint.isprintable()
    return None


def test_cards_of_any_values(given):
    table = json.loads((ROOT / "Resources/Cards/starter.json").read_text(encoding="utf-8"))
    inner = {key: table[key] for key in ("prepare", "license")}

    @given(changes(table))
    def top(changed):
        read_or_refused(lambda: card_from(changed))

    @given(changes(inner["prepare"]))
    def below(changed):
        read_or_refused(lambda: card_from({**table, "prepare": changed}))

    top()
    below()


def test_tasks_of_any_values(given, tmp_path, a_tiny_card):
    task = {"card": "x", "head": "h", "dataset": "list.json", "mapping": {"1": "liver"}, "epochs": 1}
    task |= {"replay": {"tasks": []}, "teach": {}, "supports": [], "unlabelled": [], "validation_fold": 0}
    (tmp_path / "list.json").write_text(json.dumps({"training": []}))

    @given(changes(task))
    def any_task(changed):
        (tmp_path / "task.json").write_text(json.dumps(changed))
        read_or_refused(lambda: task_of(read_task(tmp_path / "task.json"), a_tiny_card, tmp_path, tmp_path))

    any_task()


def test_messages_of_any_values(given, tmp_path):
    grid = {"shape": [4, 5, 6], "affine": np.eye(4).tolist()}
    np.save(tmp_path / "voxels.npy", np.zeros((1, 4, 5, 6), np.int16))
    job = {"folder": str(tmp_path), "voxels": "voxels.npy", "grid": grid, "modality": "", "name": "x"}
    job |= {"warnings": [], "prompt": {"kind": "everything"}, "card": None, "quality": "fast", "roi": None}
    job |= {"overrides": {"window": [8, 8, 8]}, "locate": None, "refine": None, "before": None}
    origin = {"cards": [], "prompt": "", "options": {}, "seconds": {}, "warnings": []}
    result = {"folder": str(tmp_path), "grid": grid, "layers": [], "entries": [], "origin": origin}

    @given(changes({key: value for key, value in job.items() if key != "folder"}))
    def any_job(changed):
        read_or_refused(lambda: read_job({**changed, "folder": str(tmp_path)}))

    @given(changes(result))
    def any_result(changed):
        read_or_refused(lambda: read_result(changed))

    any_job()
    any_result()


def test_clicks_of_any_values(given, tmp_path):
    table = {"positive": [[1, 2, 3]], "negative": [], "structure": "liver", "frame": "RAS"}

    @given(changes(table))
    def any_clicks(changed):
        (tmp_path / "p.json").write_text(json.dumps(changed))
        found = read_or_refused(lambda: read_points(tmp_path / "p.json"))
        assert found is None or isinstance(found, Points)

    any_clicks()


def test_phrases_of_any_letters(given):
    from hypothesis import strategies as st

    words = st.sampled_from(["left", "kidney", "not", "and", "ribs", "1", "to", ",", "(", "T", "肝"])

    @given(st.text(max_size=200) | st.lists(words | st.text(max_size=4), max_size=30).map(" ".join))
    def any_phrase(phrase):
        understood = read_or_refused(lambda: understand(phrase))
        assert understood is None or understood.phrase == phrase

    any_phrase()


def test_nifti_headers_of_any_numbers(given, tmp_path):
    from hypothesis import strategies as st

    image = nibabel.Nifti1Image(np.zeros((6, 5, 4), np.int16), np.eye(4)).to_bytes()
    kinds = nibabel.Nifti1Header.template_dtype
    names = [name for name in kinds.names if kinds[name].base.kind in "iuf"]

    @given(st.dictionaries(st.sampled_from(names), st.binary(min_size=64, max_size=64), max_size=4))
    def any_header(fields):
        raw = bytearray(image)
        header = np.frombuffer(raw, kinds, count=1)
        for name, data in fields.items():
            kind = kinds[name]
            header[name] = np.frombuffer(data[: kind.itemsize], kind.base).reshape(kind.shape)
        path = tmp_path / "x.nii.gz"
        path.write_bytes(gzip.compress(bytes(raw), 1))
        with np.errstate(all="ignore"):
            volume = read_or_refused(lambda: read_image(path))
        assert volume is None or np.isfinite(volume.array).all()

    any_header()


@pytest.mark.skipif(sys.platform != "linux", reason="atheris runs on Linux alone")
@pytest.mark.parametrize("family", PLACES)
def test_bytes_guided_by_coverage(family):
    pytest.importorskip("atheris", reason="installed by `make verify`")
    words = [sys.executable, "-m", "fuzz.coverage", family, "--runs", str(RUNS)]
    paths = os.pathsep.join([str(ROOT / "Testing"), str(ROOT)])
    done = subprocess.run(
        words, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, timeout=900
    )
    said = done.stderr.decode(errors="replace")
    assert done.returncode == 0, said[-3000:]
    assert f"Done {RUNS} runs" in said
