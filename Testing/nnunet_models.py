"""Small models in nnU-Net v2's layout: their plans.json and dataset.json as tables, one per kind of model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

CLASSES = {
    "plain": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
    "residual": "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet",
}


@dataclass(frozen=True)
class Model:
    """One kind of model and the phantom it is tried on."""

    name: str
    kind: str = "plain"
    labels: dict[str, Any] = field(default_factory=lambda: {"background": 0, "liver": 1, "spleen": 2})
    order: tuple[int, ...] | None = None
    channels: tuple[str, ...] = ("CT",)
    schemes: tuple[str, ...] = ("CTNormalization",)
    mask: bool = False
    spacing: tuple[float, ...] = (2.0, 1.7, 1.7)
    patch: tuple[int, ...] = (32, 32, 32)
    strides: tuple[Any, ...] = ((1, 1, 1), (2, 2, 2), (2, 2, 2))
    kernels: tuple[Any, ...] = ((3, 3, 3),) * 3
    transpose: tuple[int, ...] = (0, 1, 2)
    configuration: str = "3d_fullres"
    reader: str = "SimpleITKIO"
    folds: int = 1
    old_plans: bool = False
    scan_shape: tuple[int, int, int] = (40, 52, 48)
    scan_spacing: tuple[float, float, float] = (2.5, 1.3, 1.5)

    @property
    def dataset(self) -> str:
        """The name of its data set's folder."""
        return f"Dataset001_{self.name.title()}"


MODELS = {
    model.name: model
    for model in (
        Model("plain"),
        Model("residual", kind="residual"),
        Model(
            "anisotropic",
            spacing=(5.0, 1.2, 1.2),
            patch=(13, 32, 32),
            strides=((1, 1, 1), (1, 2, 2), (1, 2, 2)),
            kernels=((1, 3, 3), (3, 3, 3), (3, 3, 3)),
            transpose=(1, 0, 2),
            scan_shape=(52, 20, 50),
            scan_spacing=(1.4, 6.0, 1.3),
        ),
        Model(
            "regions",
            labels={"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3, "ignore": 4},
            order=(1, 2, 3),
            channels=("T1", "FLAIR"),
            schemes=("ZScoreNormalization",) * 2,
            mask=True,
        ),
        Model("folds", folds=3, labels={"background": 0, "liver": 1, "spleen": 2, "ignore": 3}),
        Model(
            "small", patch=(48, 64, 48), scan_shape=(30, 41, 52), configuration="3d_lowres", old_plans=True
        ),
    )
}


def plans_of(model: Model) -> dict[str, Any]:
    """plans.json of a model."""
    levels = len(model.strides)
    features = [6 * 2**level for level in range(levels)]
    resampling = {"is_seg": False, "order_z": 0, "force_separate_z": None}
    table: dict[str, Any] = {
        "data_identifier": "x",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": list(model.patch),
        "median_image_size_in_voxels": list(model.patch),
        "spacing": list(model.spacing),
        "normalization_schemes": list(model.schemes),
        "use_mask_for_norm": [model.mask] * len(model.schemes),
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": {**resampling, "order": 3},
        "resampling_fn_seg_kwargs": {**resampling, "is_seg": True, "order": 1},
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": {**resampling, "order": 1},
        "batch_dice": True,
    }
    table |= _old_architecture(model, features) if model.old_plans else _architecture(model, features)
    seen = {"mean": 60.0, "std": 180.0, "percentile_00_5": -900.0, "percentile_99_5": 320.0}
    return {
        "dataset_name": model.dataset,
        "plans_name": "nnUNetPlans",
        "image_reader_writer": model.reader,
        "transpose_forward": list(model.transpose),
        "transpose_backward": [model.transpose.index(axis) for axis in range(3)],
        "configurations": {
            "base": table,
            model.configuration: {"inherits_from": "base", "data_identifier": "y"},
        },
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {str(n): seen for n in range(len(model.channels))},
    }


def dataset_of(model: Model) -> dict[str, Any]:
    """dataset.json of a model."""
    table: dict[str, Any] = {
        "channel_names": {str(n): name for n, name in enumerate(model.channels)},
        "labels": model.labels,
        "numTraining": 1,
        "file_ending": ".nii.gz",
    }
    return table | ({"regions_class_order": list(model.order)} if model.order else {})


def _architecture(model: Model, features: list[int]) -> dict[str, Any]:
    levels = len(features)
    counts = {"n_conv_per_stage": [2] * levels} if model.kind == "plain" else {}
    counts |= {"n_blocks_per_stage": [1, 2, 2]} if model.kind == "residual" else {}
    numbers = {
        "n_stages": levels,
        "features_per_stage": features,
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [list(k) for k in model.kernels],
        "strides": [list(s) for s in model.strides],
        **counts,
        "n_conv_per_stage_decoder": [2 if model.kind == "plain" else 1] * (levels - 1),
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    return {
        "architecture": {
            "network_class_name": CLASSES[model.kind],
            "arch_kwargs": numbers,
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        }
    }


def _old_architecture(model: Model, features: list[int]) -> dict[str, Any]:
    """The same as nnU-Net v2 wrote it before 2.3."""
    levels = len(features)
    return {
        "UNet_class_name": "PlainConvUNet",
        "UNet_base_num_features": features[0],
        "unet_max_num_features": 320,
        "n_conv_per_stage_encoder": [2] * levels,
        "n_conv_per_stage_decoder": [2] * (levels - 1),
        "num_pool_per_axis": [levels - 1] * 3,
        "pool_op_kernel_sizes": [list(s) for s in model.strides],
        "conv_kernel_sizes": [list(k) for k in model.kernels],
    }
