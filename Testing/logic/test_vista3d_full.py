"""VISTA3D at its full size: each published layout of its weights; real scans against MONAI's pipeline."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_vista3d import CPU, LAYOUTS, a_card, a_net, monais_labels

from CTSegLogic.files.images import read_image
from CTSegLogic.files.weights import cards, file_spec
from CTSegLogic.nets.vista3d import build, class_features, class_vectors, point_features, point_logits
from CTSegLogic.systems import open_system
from CTSegLogic.values.card import License
from CTSegLogic.values.grid import Box
from CTSegLogic.values.prompt import Classes, resolve
from CTSegLogic.values.volume import Volume

pytest.importorskip("monai", reason="VISTA3D's network is MONAI's")

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = 217_964_982 * 4  # bytes
SIDE = 32

# The loader alone, in a process of its own: what it takes above the libraries, which are imported before.
CHILD = """
import json, re, sys
from dataclasses import replace
from pathlib import Path
import torch, safetensors.torch
import monai.networks.nets.vista3d
import monai.networks.nets.segresnet_ds
import CTSegLogic.systems.vista3d
from CTSegLogic.systems import open_system
from CTSegLogic.values.card import read_card
from CTSegLogic.values.run import Run
# Not getrusage: its peak begins with that of the process that started this one.
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
before = peak()
system = open_system(read_card(Path(sys.argv[1])), Run(device="cpu"))
loaded = peak()
total = sum(float(p.double().sum()) for p in system.net.parameters())
print(json.dumps({"load": loaded - before, "touched": peak() - before}))
"""


@pytest.fixture(scope="module")
def the_published_size():
    """A network of the published size with random weights, and MONAI's own answers for one window."""
    torch.manual_seed(0)
    net = build().eval().requires_grad_(False)
    assert sum(p.numel() for p in net.parameters()) * 4 == WEIGHTS
    x = torch.rand(1, 1, SIDE, SIDE, SIDE)
    points, labels = torch.tensor([[5.0, 6.0, 7.0], [20.0, 3.0, 31.0]]), torch.tensor([1, 0])
    with torch.inference_mode():
        classes = net(x, class_vector=torch.tensor([[3], [132]]))
        clicked = net(x, point_coords=points[None], point_labels=labels[None], prompt_class=torch.tensor([3]))
    return net.state_dict(), x, points, labels, classes, clicked


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_full_size_weights_of_each_layout_answer_as_monais_network(tmp_path, layout, the_published_size):
    state, x, points, labels, classes, clicked = the_published_size
    table = LAYOUTS[layout](state)
    if layout == "hugging face":
        from safetensors.torch import save_file

        path = tmp_path / "model.safetensors"
        save_file(table, path)
    else:
        path = tmp_path / "model.pt"
        torch.save(table, path)
    card = replace(
        cards()["vista3d"], files={"model": file_spec(path)}, license=License(name="test"), folder=tmp_path
    )
    (tmp_path / "card.json").write_text(card.to_json(), encoding="utf-8")
    net = open_system(card, CPU).net
    with torch.inference_mode():
        ours = torch.einsum("nc,bcxyz->nbxyz", class_vectors(net, [3, 132]), class_features(net, x))
        mine = point_logits(net, point_features(net, x), (SIDE,) * 3, points, labels, zero_shot=False)
    assert float(classes.std()) > 1e-3
    torch.testing.assert_close(ours, classes, atol=1e-5, rtol=0)
    torch.testing.assert_close(mine, clicked, atol=1e-5, rtol=0)
    del net, ours, mine
    check_peak(tmp_path)
    path.unlink()


def check_peak(folder):
    """The loader takes at most half a GB above the weights, and so does reading every one of them."""
    if sys.platform != "linux":
        return  # where a process's own peak is not to be had
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder / "card.json")], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["load"] < WEIGHTS + 500e6, figures
    assert WEIGHTS < figures["touched"] < WEIGHTS + 500e6, figures
    sys.stderr.write(f"{figures}\n")  # seen with -s


# In double precision, since one voxel of the MR lies nearer to a tie than single precision can tell: there
# MONAI's own two best logits are 1.2e-7 apart in float32, and the other way round in float64.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["ts_ct_sm.nii.gz", "ts_mr_sm.nii.gz"])
def test_a_real_scan_gets_the_labels_of_the_published_pipeline(tmp_path, data_dir, name):
    from monai.transforms import ScaleIntensityRanged, ScaleIntensityRangePercentilesd

    mr = "mr" in name
    card = a_card(tmp_path, "ctmr" if mr else "vista3d", patch=(64, 64, 32))
    tone = card.prepare.intensity
    intensity = (
        ScaleIntensityRangePercentilesd("image", 1, 99, 0.0, 1.0, clip=True)
        if mr
        else ScaleIntensityRanged("image", *tone.clip, 0.0, 1.0, clip=True)
    )
    scan = read_image([data_dir / "fulllabel" / name], modality="MR" if mr else "CT")
    middle = Box(start_kji=(0, 20, 20), stop_kji=(min(20, scan.grid.shape[0]), 70, 80))
    array = np.ascontiguousarray(scan.array[(slice(None), *middle.slices)])
    volume = Volume(array=array, grid=scan.grid.cropped(middle), modality=scan.modality, name="part")
    keys = card.heads[0].structures[:20]
    net = a_net().double()
    expected = monais_labels(volume, net, [card.labels[k] for k in keys], (64, 64, 32), intensity)
    result = open_system(card, CPU).segment(volume, resolve(Classes(keys), card), CPU)
    ours = np.zeros(volume.grid.shape, int)
    for number, key in enumerate(keys, start=1):
        ours[result.mask(key)] = number
    assert len(np.unique(expected)) > 3
    assert int((ours != expected).sum()) == 0
