"""A checksum over what a trace says: its metadata, its columns' names and all their values.

Parquet guards the pages of a file by checksums of its own, but not the footer, which holds the
metadata, the names of the columns and the places of their pages.
"""

from __future__ import annotations

import hashlib

import pyarrow as pa
import pyarrow.compute as pc


def checksum_of(table: pa.Table, meta: bytes) -> str:
    """Return a checksum of a table and its metadata, the same before and after a file.

    Args:
        table: The rows. Of columns with types other than numbers, flags, texts and lists of them,
            only names and lengths count, since Parquet may change such types.
        meta: The metadata as they stand in the file.

    Returns:
        SHA-256 as 64 hexadecimal digits.
    """
    digest = hashlib.sha256(meta)
    for name in table.column_names:
        digest.update(f"\n{name!r} {len(table)} ".encode("utf-8", "surrogatepass"))
        _add(digest, table[name].combine_chunks())
    return digest.hexdigest()


def _add(digest: hashlib._Hash, column: pa.Array | pa.ChunkedArray) -> None:
    if isinstance(column, pa.ChunkedArray):  # older pyarrow
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    kind = column.type
    digest.update(pc.is_valid(column).to_numpy(zero_copy_only=False).tobytes())
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        lengths = pc.fill_null(pc.list_value_length(column), 0)
        digest.update(b"list" + lengths.to_numpy().astype("<i8").tobytes())
        _add(digest, column.flatten())
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
        texts = pc.fill_null(column, "")
        lengths = pc.binary_length(texts).to_numpy().astype("<i8")
        digest.update(b"text" + lengths.tobytes())
        digest.update("".join(texts.to_pylist()).encode("utf-8", "surrogatepass"))
    elif pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind):
        values = column.drop_null().to_numpy(zero_copy_only=False)
        digest.update(str(values.dtype).encode() + values.tobytes())
