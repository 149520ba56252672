"""Labels of random networks in nnU-Net's own layout, ours against the public predictor's."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from nnunet_models import MODELS

PEERS = Path(__file__).resolve().parents[1] / "peers"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("exact", [False, True], ids=["as it is", "balanced classes, its sums in fp32"])
@pytest.mark.parametrize("name", MODELS)
def test_labels_are_those_of_nnunets_own_predictor(name, exact, monkeypatch, tmp_path):
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        if variable not in os.environ:
            monkeypatch.setenv(variable, str(tmp_path))
    pytest.importorskip("nnunetv2", reason="needs the public package: pip install nnunetv2")
    monkeypatch.setattr(sys, "path", [*sys.path, str(PEERS)])
    from nnunet_layout import compare

    row = compare(MODELS[name], exact=exact)
    assert row["equal"] >= (0.9995 if exact else 0.999), row
