"""What stands inside `Annotated[...]`: defaults, checks, hints for widgets."""

from __future__ import annotations

import abc
import typing
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any


class Validator(abc.ABC):
    """A check of one value; module code may derive its own."""

    @abc.abstractmethod
    def validate(self, value: Any) -> None:
        """Raises when the value is not allowed."""


class NotNone(Validator):
    """Refuses None."""

    def validate(self, value: Any) -> None:
        """ValueError for None."""
        if value is None:
            message = "Value must not be None"
            raise ValueError(message)


class IsInstance(Validator):
    """Refuses values of other types; None passes."""

    def __init__(self, classtype: Any) -> None:
        self.classtype = classtype

    def validate(self, value: Any) -> None:
        """TypeError for another type."""
        if value is not None and not isinstance(value, self.classtype):
            message = f"Value must be of type {self.classtype}, is {type(value)} with value {value!r}"
            raise TypeError(message)


class WithinRange(Validator):
    """Refuses values outside a closed range."""

    def __init__(self, minimum: float, maximum: float) -> None:
        self.minimum, self.maximum = minimum, maximum

    def validate(self, value: Any) -> None:
        """ValueError outside."""
        if not self.minimum <= value <= self.maximum:
            message = f"Value must be within range [{self.minimum}, {self.maximum}], is {value}"
            raise ValueError(message)


class Minimum(Validator):
    """Refuses smaller values."""

    def __init__(self, minimum: float) -> None:
        self.minimum = minimum

    def validate(self, value: Any) -> None:
        """ValueError below."""
        if value < self.minimum:
            message = f"Value must be at least {self.minimum}, is {value}"
            raise ValueError(message)


class Maximum(Validator):
    """Refuses larger values."""

    def __init__(self, maximum: float) -> None:
        self.maximum = maximum

    def validate(self, value: Any) -> None:
        """ValueError above."""
        if value > self.maximum:
            message = f"Value must be at most {self.maximum}, is {value}"
            raise ValueError(message)


class Choice(Validator):
    """Refuses everything that is not listed."""

    def __init__(self, choices: Iterable[Any]) -> None:
        self.choices = choices

    def validate(self, value: Any) -> None:
        """ValueError for anything else."""
        if value not in self.choices:
            message = f"Value is {value}, but must be one of the following: {self.choices}"
            raise ValueError(message)


class Exclude(Validator):
    """Refuses everything that is listed."""

    def __init__(self, excludedValues: Iterable[Any]) -> None:
        self.excludedValues = excludedValues

    def validate(self, value: Any) -> None:
        """ValueError for what is listed."""
        if value in self.excludedValues:
            message = f"Value is {value}, but must not be one of the following: {self.excludedValues}"
            raise ValueError(message)


@dataclass(frozen=True)
class Decimals:
    """How many decimals a widget shows."""

    value: int


@dataclass(frozen=True)
class SingleStep:
    """A widget's step."""

    value: float


class Default:
    """A parameter's first value, or a function that makes it."""

    def __init__(self, value: Any = None, *, generator: Callable[[], Any] | None = None) -> None:
        self._value, self._generator = value, generator

    @property
    def value(self) -> Any:
        """The value; a copy, so that nobody changes the default."""
        return self._generator() if self._generator is not None else deepcopy(self._value)


def split(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """A type hint without its annotations, and the annotations."""
    if typing.get_origin(hint) is typing.Annotated:
        kind, *annotations = typing.get_args(hint)
        return kind, tuple(annotations)
    return hint, ()


def first(annotations: Iterable[Any], kind: type) -> Any:
    """The first annotation of a kind, or None."""
    return next((a for a in annotations if isinstance(a, kind)), None)


def made(annotation: Any) -> Any:
    """An annotation given as a class instead of an instance becomes an instance."""
    return annotation() if isinstance(annotation, type) and issubclass(annotation, Validator) else annotation
