"""Rows of Parquet files, Arrow files and hub datasets, decoded by the Arrow type of each column.

Arrow's own `to_pylist` gives the text of a JSON value, a list of pairs for a map, and in each
struct the keys of all other rows, as nulls. Here the rows of a table are what a JSONL file of the
same data would hold.
"""

import json
from collections.abc import Callable, Iterator
from datetime import date, time
from decimal import Decimal
from typing import Any

import pyarrow as pa

from finetune.data.checks import Row

Decoder = Callable[[Any], Any]


def rows_of_table(table: pa.Table | pa.RecordBatch) -> Iterator[Row]:
    """The rows of a table in order, without the columns that are null. One batch: a few MB."""
    decode = struct_decoder(table.schema)
    for row in table.to_pylist():
        yield decode(row)


def decoder_of(type_: pa.DataType) -> Decoder | None:
    """What turns a value of `to_pylist` into the value meant; None where they are the same."""
    if isinstance(type_, pa.JsonType):
        return json.loads
    if isinstance(type_, pa.BaseExtensionType):
        return decoder_of(type_.storage_type)
    if pa.types.is_dictionary(type_) or pa.types.is_run_end_encoded(type_):
        return decoder_of(type_.value_type)
    if pa.types.is_struct(type_):
        return struct_decoder(type_)
    if pa.types.is_map(type_):
        return map_decoder(type_)
    if is_list(type_):
        return list_decoder(type_)
    return decoder_of_scalar(type_)


def is_list(type_: pa.DataType) -> bool:
    return any(
        check(type_)
        for check in (
            pa.types.is_list,
            pa.types.is_large_list,
            pa.types.is_fixed_size_list,
            pa.types.is_list_view,
            pa.types.is_large_list_view,
        )
    )


def decoder_of_scalar(type_: pa.DataType) -> Decoder | None:
    """Bytes become text, dates ISO 8601 and decimals numbers, as an export to JSON has them."""
    if pa.types.is_decimal(type_):
        return number_of_decimal
    if pa.types.is_temporal(type_):
        return text_of_time
    if (
        pa.types.is_binary(type_)
        or pa.types.is_large_binary(type_)
        or pa.types.is_binary_view(type_)
        or pa.types.is_fixed_size_binary(type_)
    ):
        return text_of_bytes
    return None


def struct_decoder(fields: pa.StructType | pa.Schema) -> Decoder:
    """Null children are left out: they stand for keys that the object does not have.

    So is a struct inside a struct that has null children alone. Some writers (polars, pandas) put
    such structs where a row has no object at all, and a tool would have parameters of other tools.
    """
    decoders = {field.name: decoder_of(field.type) for field in fields}
    structs = {field.name for field in fields if pa.types.is_struct(field.type)}

    def decode(value: Row) -> Row:
        row = {}
        for name, item in value.items():
            if item is None:
                continue
            decoder = decoders[name]
            decoded = item if decoder is None else decoder(item)
            if decoded or name not in structs:
                row[name] = decoded
        return row

    return decode


def list_decoder(type_: pa.DataType) -> Decoder | None:
    decoder = decoder_of(type_.value_type)
    if decoder is None:
        return None
    return lambda items: [None if item is None else decoder(item) for item in items]


def map_decoder(type_: pa.MapType) -> Decoder:
    """A map's keys are those of the row alone, so a null among its values was written as one."""
    key_decoder, item_decoder = decoder_of(type_.key_type), decoder_of(type_.item_type)

    def decode(pairs: list[tuple[Any, Any]]) -> Row:
        return {
            str(key_decoder(key) if key_decoder else key): (
                item_decoder(item) if item_decoder and item is not None else item
            )
            for key, item in pairs
        }

    return decode


def number_of_decimal(value: Decimal) -> int | float:
    return int(value) if value == value.to_integral_value() else float(value)


def text_of_time(value: Any) -> Any:
    """ISO 8601 for what has a date or a time of day. A duration is written as Python does."""
    return value.isoformat() if isinstance(value, date | time) else str(value)


def text_of_bytes(value: bytes) -> str | bytes:
    """Old writers did not mark text as text. Bytes that are no UTF-8 stay bytes, for the checks."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value
