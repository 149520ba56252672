"""ctk's number inputs: sliders and spin boxes over real numbers, one value or a range."""

from __future__ import annotations

from typing import Any

from PySide6 import QtCore, QtWidgets
from PySide6.QtCore import Property, Signal

from slicerhost.ctk_base import forwarded, register, stored

_TICKS = 10000  # positions of the integer slider inside


@register
class ctkDoubleSpinBox(QtWidgets.QDoubleSpinBox):
    """A spin box; ctk's own extra decimals modes are left out."""


class _Slider(QtWidgets.QWidget):
    """A slider over real numbers, with or without a spin box."""

    valueChanged = Signal(float)
    valueIsChanging = Signal(float)

    def __init__(self, parent: Any = None) -> None:
        if isinstance(parent, QtCore.Qt.Orientation):
            parent = None
        super().__init__(parent)
        self._low, self._high, self._value = 0.0, 99.0, 0.0
        self._track = QtWidgets.QSlider(QtCore.Qt.Horizontal)
        self._track.setRange(0, _TICKS)
        self._box = QtWidgets.QDoubleSpinBox()
        layout = QtWidgets.QHBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(self._track, 1)
        layout.addWidget(self._box)
        self._track.valueChanged.connect(self._onTrack)
        self._box.valueChanged.connect(self._setValue)
        self._fit()

    def spinBox(self) -> QtWidgets.QDoubleSpinBox:
        """The spin box."""
        return self._box

    def slider(self) -> QtWidgets.QSlider:
        """The slider itself."""
        return self._track

    def setRange(self, low: float, high: float) -> None:
        """Sets both ends."""
        self._low, self._high = float(low), float(high)
        self._fit()

    def reset(self) -> None:
        """Puts the value to the low end."""
        self._setValue(self._low)

    def _fit(self) -> None:
        self._box.blockSignals(True)
        self._box.setRange(self._low, self._high)
        self._box.blockSignals(False)
        self._setValue(self._value)

    def _onTrack(self, tick: int) -> None:
        step = self._box.singleStep or 1.0
        value = self._low + (self._high - self._low) * tick / _TICKS
        self._setValue(self._low + round((value - self._low) / step) * step)

    def _setValue(self, value: float) -> None:
        value = min(max(float(value), self._low), self._high)
        changed, self._value = value != self._value, value
        span = max(self._high - self._low, 1e-12)
        for part, shown in ((self._box, value), (self._track, round(_TICKS * (value - self._low) / span))):
            part.blockSignals(True)
            part.setValue(shown)
            part.blockSignals(False)
        if changed:
            self.valueChanged.emit(value)

    def _setLow(self, low: float) -> None:
        self.setRange(low, max(float(low), self._high))

    def _setHigh(self, high: float) -> None:
        self.setRange(min(float(high), self._low), high)

    value = Property(float, lambda self: self._value, _setValue)
    minimum = Property(float, lambda self: self._low, _setLow)
    maximum = Property(float, lambda self: self._high, _setHigh)
    singleStep = forwarded(float, "_box", "singleStep")
    decimals = forwarded(int, "_box", "decimals")
    suffix = forwarded(str, "_box", "suffix")
    prefix = forwarded(str, "_box", "prefix")
    pageStep = stored(float, "pageStep", 1.0)
    tickInterval = stored(float, "tickInterval", 0.0)
    tracking = stored(bool, "tracking", True)
    spinBoxVisible = stored(bool, "spinBoxVisible", True, lambda self, shown: self._box.setVisible(shown))

    def setValue(self, value: float) -> None:
        """Sets the value, clipped to the range."""
        self._setValue(value)


for _name in (
    "Minimum",
    "Maximum",
    "SingleStep",
    "Decimals",
    "Suffix",
    "Prefix",
    "PageStep",
    "SpinBoxVisible",
):
    _property = _name[0].lower() + _name[1:]
    setattr(_Slider, f"set{_name}", lambda self, given, _p=_property: setattr(self, _p, given))


@register
class ctkSliderWidget(_Slider):
    """A slider with a spin box."""


@register
class ctkDoubleSlider(_Slider):
    """A slider without a spin box."""

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self._box.hide()


@register
class ctkRangeWidget(QtWidgets.QWidget):
    """Two values in a range, as two spin boxes."""

    valuesChanged = Signal(float, float)
    minimumValueChanged = Signal(float)
    maximumValueChanged = Signal(float)

    def __init__(self, parent: Any = None) -> None:
        super().__init__(parent)
        self._first, self._second = QtWidgets.QDoubleSpinBox(), QtWidgets.QDoubleSpinBox()
        layout = QtWidgets.QHBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        for box in (self._first, self._second):
            box.setRange(0, 99)
            layout.addWidget(box)
            box.valueChanged.connect(self._onBox)
        self._second.setValue(99)

    def setValues(self, low: float, high: float) -> None:
        """Sets both values."""
        self._first.setValue(low)
        self._second.setValue(high)

    def setRange(self, low: float, high: float) -> None:
        """Sets the ends both values keep to."""
        for box in (self._first, self._second):
            box.setRange(low, high)

    def _onBox(self, _value: float) -> None:
        self.minimumValueChanged.emit(self._first.value)
        self.maximumValueChanged.emit(self._second.value)
        self.valuesChanged.emit(self._first.value, self._second.value)

    minimumValue = forwarded(float, "_first", "value")
    maximumValue = forwarded(float, "_second", "value")
    minimum = Property(
        float, lambda self: self._first.minimum, lambda self, low: self.setRange(low, self._first.maximum)
    )
    maximum = Property(
        float, lambda self: self._first.maximum, lambda self, high: self.setRange(self._first.minimum, high)
    )
    singleStep = stored(
        float,
        "singleStep",
        1.0,
        lambda self, step: [box.setSingleStep(step) for box in (self._first, self._second)],
    )
    decimals = stored(
        int, "decimals", 2, lambda self, n: [box.setDecimals(n) for box in (self._first, self._second)]
    )


@register
class ctkDoubleRangeSlider(ctkRangeWidget):
    """Two values in a range."""
