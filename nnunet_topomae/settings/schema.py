"""How blocks of a plans file are described, checked and filled in.

The planner writes a ``pretraining`` and a ``finetuning`` block into each configuration; users edit them as they edit
the rest of their plans. A block is described by a frozen dataclass whose fields are made by :func:`setting` and
:func:`block`. A key left out takes its default; an unknown or out-of-range one is an error.
"""

import dataclasses
import difflib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@dataclass(frozen=True)
class Number:
    """Accepts finite numbers from ``low`` to ``high``; ``low_open`` and ``high_open`` leave out the bound itself.

    ``optional`` lets in null, too.
    """

    low: float
    high: float = float("inf")
    integer: bool = False
    low_open: bool = False
    high_open: bool = False
    optional: bool = False

    def accepts(self, value: Any) -> bool:
        """Whether ``value`` is a number in the range, and a whole one if asked; true and false are no numbers."""
        if value is None:
            return self.optional
        kind = int if self.integer else (int, float)
        if isinstance(value, bool) or not isinstance(value, kind) or not abs(value) <= sys.float_info.max:
            return False
        above = value > self.low if self.low_open else value >= self.low
        return above and (value < self.high if self.high_open else value <= self.high)

    def __str__(self) -> str:
        kind = f"{'null or ' * self.optional}{'a whole number' if self.integer else 'a number'}"
        low = f"{'above' if self.low_open else 'of at least'} {_as_written(self.low)}"
        if self.high == float("inf"):
            return f"{kind} {low}"
        return f"{kind} {low} and {'below' if self.high_open else 'at most'} {_as_written(self.high)}"


def _as_written(number: float) -> str:
    """A number as people write it: 2,147,483,647 rather than 2.14748e+09."""
    return f"{int(number):,}" if number == int(number) else f"{number:g}"


@dataclass(frozen=True)
class Flag:
    """Accepts true and false."""

    def accepts(self, value: Any) -> bool:
        """Whether ``value`` is a bool."""
        return isinstance(value, bool)

    def __str__(self) -> str:
        return "true or false"


@dataclass(frozen=True)
class Subset:
    """Accepts a non-empty list of distinct names."""

    names: tuple[str, ...]

    def accepts(self, value: Any) -> bool:
        """Whether ``value`` lists some of the names, each once."""
        is_list = isinstance(value, Sequence) and not isinstance(value, str)
        known = is_list and all(isinstance(name, str) and name in self.names for name in value)
        return known and 0 < len(value) == len(set(value))

    def __str__(self) -> str:
        return f"a list of one or more of {', '.join(self.names)}"


@dataclass(frozen=True)
class Grid:
    """Accepts null or three positive whole numbers."""

    def accepts(self, value: Any) -> bool:
        """Whether ``value`` is None or three positive integers."""
        cell = Number(1, integer=True)
        return value is None or (isinstance(value, Sequence) and len(value) == 3 and all(map(cell.accepts, value)))

    def __str__(self) -> str:
        return "null or three whole numbers of at least 1"


@dataclass(frozen=True)
class Numbers:
    """Accepts a list of ``count`` numbers, each of which ``each`` accepts."""

    count: int
    each: Number

    def accepts(self, value: Any) -> bool:
        """Whether ``value`` lists as many numbers, all of them accepted."""
        is_list = isinstance(value, Sequence) and not isinstance(value, str)
        return is_list and len(value) == self.count and all(map(self.each.accepts, value))

    def __str__(self) -> str:
        return f"a list of {self.count}, each {self.each}"


@dataclass(frozen=True)
class Identifiers:
    """Accepts a list of distinct dataset IDs."""

    def accepts(self, value: Any) -> bool:
        """Whether ``value`` lists whole numbers of at least 0, each once."""
        number = Number(0, integer=True)
        is_list = isinstance(value, Sequence) and not isinstance(value, str)
        return is_list and all(map(number.accepts, value)) and len(set(value)) == len(value)

    def __str__(self) -> str:
        return "a list of dataset IDs"


@dataclass(frozen=True)
class Choice:
    """Accepts one of some names."""

    names: tuple[str, ...]

    def accepts(self, value: Any) -> bool:
        """Whether ``value`` is one of the names."""
        return isinstance(value, str) and value in self.names

    def __str__(self) -> str:
        return f"one of {', '.join(self.names)}"


@dataclass(frozen=True)
class Name:
    """Accepts null or the name of a class."""

    def accepts(self, value: Any) -> bool:
        """Whether ``value`` is None or an identifier."""
        return value is None or (isinstance(value, str) and value.isidentifier())

    def __str__(self) -> str:
        return "null or the name of a trainer"


@dataclass(frozen=True)
class PlansName:
    """Accepts null or the name of plans, which is that of a file without its ending."""

    def accepts(self, value: Any) -> bool:
        """Whether ``value`` is None or a name that leads to no other folder."""
        return value is None or (isinstance(value, str) and value != "" and "/" not in value)

    def __str__(self) -> str:
        return "null or the name of plans"


Accepted = Number | Numbers | Flag | Subset | Grid | Identifiers | Choice | Name | PlansName


def setting(default: Any, accepted: Accepted, meaning: str, source: str) -> Any:
    """A dataclass field that knows which values it accepts and how the reference describes it.

    Args:
        default: the value where plans do not have the key.
        accepted: what the value may be.
        meaning: what the value does, for the reference.
        source: where the default comes from, such as a section of a paper.
    """
    return dataclasses.field(default=default, metadata={"accepted": accepted, "meaning": meaning, "source": source})


def block(kind: type) -> Any:
    """A dataclass field that is itself a block of settings."""
    return dataclasses.field(default_factory=kind, metadata={"block": kind})


def with_default(config_class: type, name: str, default: Any, source: str) -> Any:
    """A field like that of a parent class, but with another default.

    Args:
        config_class: the parent class.
        name: the field's name.
        default, source: see :func:`setting`.
    """
    (field,) = (field for field in dataclasses.fields(config_class) if field.name == name)
    return setting(default, field.metadata["accepted"], field.metadata["meaning"], source)


class UnknownKeyError(ValueError):
    """Plans have a key that a block does not know, nor one like it."""


Config = TypeVar("Config", bound="DataclassInstance")


def read_block(config_class: type[Config], values: Mapping[str, Any], name: str) -> Config:
    """Check a block of a plans file and fill in defaults.

    Args:
        config_class: dataclass that describes the block; may have a class method ``fill_in`` that adds keys.
        values: the block as read from JSON.
        name: of the block, for messages, such as ``pretraining``.

    Returns:
        The settings, an instance of ``config_class``.

    Raises:
        ValueError: names the unknown (:class:`UnknownKeyError`) or out-of-range key and what would be accepted.

    Example:
        >>> from nnunet_topomae.settings import FinetuningConfig, read_block
        >>> config = read_block(FinetuningConfig, {"drop_path": 0.2}, "finetuning")
        >>> config.drop_path, config.layer_decay
        (0.2, 0.75)
        >>> read_block(FinetuningConfig, {"drop_path": 2}, "finetuning")
        Traceback (most recent call last):
        ValueError: finetuning.drop_path in the plans must be a number of at least 0 and below 1, got 2
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{name} must be a block of settings, got {values!r}")
    values = getattr(config_class, "fill_in", dict)(values)
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    for key in values:
        if key not in fields:
            said = f"unknown key {name}.{key} in the plans"
            if close := difflib.get_close_matches(key, fields, n=1):
                raise ValueError(f"{said}; did you mean {close[0]}?")
            raise UnknownKeyError(f"{said}; known keys: {', '.join(fields)}")
    return config_class(**{key: _read_value(fields[key], value, f"{name}.{key}") for key, value in values.items()})


def _read_value(field: dataclasses.Field, value: Any, name: str) -> Any:
    if "block" in field.metadata:
        return read_block(field.metadata["block"], value, name)
    accepted = field.metadata["accepted"]
    if not accepted.accepts(value):
        raise ValueError(f"{name} in the plans must be {accepted}, got {value!r}")
    return tuple(value) if isinstance(value, list) else value


def to_block(config: Any) -> dict[str, Any]:
    """Write settings as a block of a plans file, in plain JSON types; :func:`read_block` reads it back."""
    return {
        key: list(value) if isinstance(value, tuple) else to_block(value) if dataclasses.is_dataclass(value) else value
        for key, value in ((field.name, getattr(config, field.name)) for field in dataclasses.fields(config))
    }


def flatten(block: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key.

    Example:
        >>> flatten({"topology": {"grid": [8, 8, 8]}, "seed": 1}, "pretraining.")
        {'pretraining.topology.grid': [8, 8, 8], 'pretraining.seed': 1}
    """
    flat: dict[str, Any] = {}
    for key, value in block.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat
