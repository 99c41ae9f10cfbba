"""Values inside values: JSON text in cells, tool calls in wire form, and the null keys with which Arrow fills up objects.

Arrow gives every object of a column the keys of all. The rows that this package writes keep objects apart (see
:mod:`.shapes`: an object that holds a null is stored as JSON), so a null key of an Arrow struct is never data there. In files
that others wrote the two can't be told apart, and a null key is taken for padding.
"""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, LargeList, List
from datasets.features.features import FeatureType

from rlhf_lightning.data.messages import is_conversation
from rlhf_lightning.data.tool_calls import parse_json

# Columns that hold lists or objects in every format that has them; in CSV they are JSON text.
NESTED = ("messages", "conversations", "completions", "ranks", "ranking", "labels", "ratings", "history")
# Columns that hold text, or an object with a certain key.
OBJECTS = {"question": "problem", "label": "steps", "input": "messages"}
# Columns that hold text, or messages.
TEXT_OR_MESSAGES = (
    *("prompt", "completion", "chosen", "rejected", "rejected_response", "rejected_messages", "context"),
    *("preferred_output", "non_preferred_output"),
)


def decode_cell(name: str, value: Any) -> Any:
    """The list or object that a cell spells as JSON text, where its column may hold one; other values as they are."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    parsed = parse_json(value)
    if name in NESTED:
        meant = parsed is not None
    elif name in OBJECTS:
        meant = isinstance(parsed, dict) and OBJECTS[name] in parsed
    else:
        meant = name in TEXT_OR_MESSAGES and is_conversation(parsed if isinstance(parsed, list) else [parsed])
        meant = meant and all(
            isinstance(part, dict) and len(part) > 1 for part in ([parsed] if isinstance(parsed, dict) else parsed)
        )
    return parsed if meant else value


def without_padding(value: Any, feature: FeatureType) -> Any:
    """The value without the null keys of Arrow structs, at every depth; what is stored as JSON keeps its nulls."""
    if value is None or not has_struct(feature):
        return value
    if isinstance(feature, dict):
        parts = ((name, without_padding(value.get(name), inner)) for name, inner in feature.items())
        return {name: part for name, part in parts if part is not None}
    if isinstance(feature, List | LargeList):
        return [without_padding(part, feature.feature) for part in value]
    return [without_padding(part, feature[0]) for part in value]


def has_struct(feature: FeatureType) -> bool:
    """Whether there is an Arrow struct anywhere inside."""
    if isinstance(feature, dict):
        return True
    if isinstance(feature, List | LargeList):
        return has_struct(feature.feature)
    return isinstance(feature, list) and has_struct(feature[0])


def padded_columns(dataset: Dataset, names: Sequence[str]) -> list[str]:
    """Those of the columns in which a struct has a null key."""
    return [name for name in names if has_struct(dataset.features[name]) and has_null_key(dataset.data[name])]


def has_null_key(column: pa.ChunkedArray) -> bool:
    """Whether a struct in the column, at whatever depth, is there and has a null key."""
    if pa.types.is_struct(column.type):
        column = column.drop_null()
        parts = [pc.struct_field(column, [index]) for index in range(column.type.num_fields)]
        return any(part.null_count or has_null_key(part) for part in parts)
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type) or pa.types.is_fixed_size_list(column.type):
        return has_null_key(pc.list_flatten(column))
    return False
