"""`slicer.parameterNodeWrapper`: own code for the documented behaviour of Slicer's wrapper."""

from __future__ import annotations

from slicerhost.parameters.annotations import (
    Choice,
    Decimals,
    Default,
    Exclude,
    IsInstance,
    Maximum,
    Minimum,
    NotNone,
    SingleStep,
    Validator,
    WithinRange,
)
from slicerhost.parameters.containers import ObservedDict, ObservedList
from slicerhost.parameters.packs import isParameterPack, parameterPack
from slicerhost.parameters.wrapper import (
    SlicerParameterNamePropertyName,
    findChildWidgetForParameter,
    isParameterNodeWrapper,
    parameterNodeWrapper,
)

__all__ = [
    "Choice",
    "Decimals",
    "Default",
    "Exclude",
    "IsInstance",
    "Maximum",
    "Minimum",
    "NotNone",
    "ObservedDict",
    "ObservedList",
    "SingleStep",
    "SlicerParameterNamePropertyName",
    "Validator",
    "WithinRange",
    "findChildWidgetForParameter",
    "isParameterNodeWrapper",
    "isParameterPack",
    "parameterNodeWrapper",
    "parameterPack",
]
