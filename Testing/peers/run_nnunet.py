"""nnU-Net v2's own predictor over one scan, from its file to a label file: seconds per stage, peak memory.

    python Testing/peers/run_nnunet.py --model FOLDER --scan FILE.nii.gz --out FILE.nii.gz [--exact]

Runs in an environment with nnunetv2 and psutil, without this package. The steps are those of its
`predict_from_files_sequential`, called one by one. "network" is the network alone; what slides it over the
scan, blends its answers and brings them back to the scan's voxels is "blend and back".
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from measuring import Peak, Timer, Watch

for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
    os.environ.setdefault(variable, tempfile.gettempdir())


@contextlib.contextmanager
def sums_in_fp32() -> Iterator[None]:
    """The public predictor with its sums and weights in fp32 instead of fp16."""
    import nnunetv2.inference.predict_from_raw_data as module
    import torch

    zeros, gaussian = torch.zeros, module.compute_gaussian

    def wide(*sizes: Any, dtype: Any = None, **others: Any) -> Any:
        return zeros(*sizes, dtype=torch.float32 if dtype == torch.float16 else dtype, **others)

    module.compute_gaussian = lambda *a, **others: gaussian(*a, **others, dtype=torch.float32)
    torch.zeros = wide
    try:
        yield
    finally:
        torch.zeros, module.compute_gaussian = zeros, gaussian


def predicted(model: Path, scan: Path, out: Path) -> dict[str, float]:
    """Seconds per stage of one scan."""
    import torch
    from nnunetv2.inference.export_prediction import (
        convert_predicted_logits_to_segmentation_with_correct_shape as restored,
    )
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    watch = Watch()
    predictor = nnUNetPredictor(
        tile_step_size=0.5, use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False
    )
    predictor.initialize_from_trained_model_folder(str(model), None)
    plans, configuration = predictor.plans_manager, predictor.configuration_manager
    watch.mark("load")
    files = plans.image_reader_writer_class()
    data, properties = files.read_images([str(scan)])
    watch.mark("reading")
    preprocessor = configuration.preprocessor_class(verbose=False)
    data, _, properties = preprocessor.run_case_npy(
        data, None, properties, plans, configuration, predictor.dataset_json
    )
    watch.mark("prepare")
    predictor.network.forward = timer = Timer(predictor.network.forward)
    logits = predictor.predict_logits_from_preprocessed_data(torch.from_numpy(data))
    labels = restored(
        logits.cpu().numpy(),
        plans,
        configuration,
        plans.get_label_manager(predictor.dataset_json),
        properties,
        num_threads_torch=torch.get_num_threads(),
    )
    watch.mark("blend and back")
    files.write_seg(labels, str(out), properties)
    watch.mark("writing")
    np.save(out.with_suffix(".npy"), labels)
    watch.seconds["blend and back"] -= timer.seconds
    return {**watch.seconds, "network": timer.seconds, "windows": timer.count}


def main() -> None:
    """Writes the labels and says the figures."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--scan", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--exact", action="store_true", help="its sums in fp32 instead of fp16")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with Peak() as peak, sums_in_fp32() if options.exact else contextlib.nullcontext():
        figures = predicted(options.model, options.scan, options.out)
    sys.stdout.write("\n" + json.dumps({**figures, "extra_peak_bytes": peak.extra}) + "\n")


if __name__ == "__main__":
    main()
