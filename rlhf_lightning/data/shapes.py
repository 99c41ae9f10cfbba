"""What kinds of values a column holds, found block by block, and the Arrow columns that hold exactly those.

Types are inferred from all rows of a file, of which there may be more than memory holds. So each block of rows tells its
shape, and shapes are joined: text and text is text, a whole number and a fraction are fractions, and values that do not go
together, such as text and a list or objects with unlike keys, are each kept as JSON.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import pyarrow as pa
from datasets import Features, Json, List, Value
from datasets.features.features import FeatureType, generate_from_arrow_type
from datasets.table import table_cast

EXACT = 2**53  # the whole numbers up to here are float64 numbers too


@dataclass(frozen=True)
class Scalar:
    """One value; ``name`` is that of its Arrow type, or "null", "json", or "wide" for whole numbers beyond float64."""

    name: str


@dataclass(frozen=True)
class Other:
    """Values that JSON does not know, such as dates."""

    type: pa.DataType


@dataclass(frozen=True)
class Items:
    """Lists."""

    of: "Shape"


@dataclass(frozen=True)
class Fields:
    """Objects that all have these keys, none of them null."""

    of: Mapping[str, "Shape"]


Shape = Scalar | Other | Items | Fields
NULL, JSON, BOOL, INT, WIDE = (Scalar(name) for name in ("null", "json", "bool", "int64", "wide"))
FLOAT, TEXT = Scalar("float64"), Scalar("string")
SCALARS: dict[type, Shape] = {bool: BOOL, float: FLOAT, str: TEXT}


def shape_of(values: list[Any]) -> Shape:
    """The narrowest shape that holds all of them."""
    kinds = set(map(type, values)) - {type(None)}
    if not kinds:
        return NULL
    shape: Shape = NULL
    for kind in kinds:
        same = values if len(kinds) == 1 else [value for value in values if type(value) is kind]
        shape = join(shape, shape_of_kind(kind, [value for value in same if value is not None]))
    return shape


def shape_of_kind(kind: type, values: list[Any]) -> Shape:
    """The shape of values of one Python type, none of them None."""
    if kind in SCALARS:
        return SCALARS[kind]
    if kind is int:
        return WIDE if min(values) < -EXACT or max(values) > EXACT else INT
    if kind is list:
        return Items(shape_of(list(chain.from_iterable(values))))
    if kind is dict:
        keys = values[0].keys()
        # A null key of a struct stands for one that is not there (see nested.py), so objects that hold a null are JSON. So are
        # those with a NUL in a key: Arrow cuts the names of fields there.
        if not keys or any(value.keys() != keys or None in value.values() for value in values):
            return JSON
        if any("\0" in key for key in keys):
            return JSON
        return Fields({key: shape_of([value[key] for value in values]) for key in keys})
    return Other(pa.infer_type(values))


def join(one: Shape, other: Shape) -> Shape:
    """The narrowest shape that holds what either holds."""
    if one == other or other == NULL:
        return one
    if one == NULL:
        return other
    if isinstance(one, Items) and isinstance(other, Items):
        return Items(join(one.of, other.of))
    if isinstance(one, Fields) and isinstance(other, Fields) and one.of.keys() == other.of.keys():
        return Fields({key: join(shape, other.of[key]) for key, shape in one.of.items()})
    numbers = {one, other} if isinstance(one, Scalar) and isinstance(other, Scalar) else set()
    if numbers == {INT, WIDE}:
        return WIDE
    return FLOAT if numbers == {INT, FLOAT} else JSON


def feature_of(shape: Shape) -> FeatureType:
    """As the ``datasets`` library calls it."""
    if isinstance(shape, Items):
        return List(feature_of(shape.of))
    if isinstance(shape, Fields):
        return {key: feature_of(value) for key, value in shape.of.items()}
    if isinstance(shape, Other):
        return generate_from_arrow_type(shape.type)
    return Json() if shape == JSON else Value("int64" if shape == WIDE else shape.name)


def storage(shape: Shape) -> pa.DataType:
    """The Arrow type that values are written in; JSON as text."""
    if isinstance(shape, Items):
        return pa.list_(storage(shape.of))
    if isinstance(shape, Fields):
        return pa.struct([(key, storage(value)) for key, value in shape.of.items()])
    if isinstance(shape, Other):
        return shape.type
    return {JSON: pa.string(), WIDE: pa.int64(), TEXT: pa.string(), NULL: pa.null()}.get(shape) or pa.type_for_alias(
        shape.name
    )


def has_json(shape: Shape) -> bool:
    """Whether there is JSON anywhere inside."""
    if isinstance(shape, Items):
        return has_json(shape.of)
    return any(map(has_json, shape.of.values())) if isinstance(shape, Fields) else shape == JSON


def walk(value: Any, shape: Shape, change: Any) -> Any:
    """The value with ``change`` made wherever its shape says JSON."""
    if value is None or not has_json(shape):
        return value
    if isinstance(shape, Items):
        return [walk(item, shape.of, change) for item in value]
    if isinstance(shape, Fields):
        return {key: walk(value[key], inner, change) for key, inner in shape.of.items()}
    return change(value)


def to_json(value: Any) -> str:
    """A value as JSON text; dates and the like as text."""
    return json.dumps(value, ensure_ascii=False, default=str)


def to_arrow(columns: Mapping[str, Iterable[Any]], shapes: Mapping[str, Shape]) -> pa.Table:
    """Columns of Python values as a table whose schema tells ``datasets`` their features."""
    arrays = {}
    for name, shape in shapes.items():
        values = columns[name]
        encoded = [walk(value, shape, to_json) for value in values] if has_json(shape) else values
        arrays[name] = pa.array(encoded, type=storage(shape))
    features = Features({name: feature_of(shape) for name, shape in shapes.items()})
    return table_cast(pa.table(arrays), features.arrow_schema)


def from_arrow(column: pa.ChunkedArray, shape: Shape) -> list[Any]:
    """The Python values of a column that :func:`to_arrow` made."""
    values = column.to_pylist()
    return [walk(value, shape, json.loads) for value in values] if has_json(shape) else values
