"""Safetensors files with hashes: written reproducibly, byte for byte, and read only if nothing in them has changed.

The metadata ``payload_hash`` is that of the tensors' bytes; ``header_hash`` is that of everything else, so that a
header can be trusted without the tensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import IO, Any

from safetensors import SafetensorError
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor

from spade_fast._util.strict_json import canonical_json, parse_json

_METADATA, _HEADER_HASH, _PAYLOAD_HASH = "__metadata__", "header_hash", "payload_hash"


def safetensors_file(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return the bytes of a safetensors file, always the same for the same tensors and metadata.

    The safetensors library itself writes metadata with several keys in random order.
    """
    plain = to_safetensors(dict(tensors))
    end = 8 + int.from_bytes(plain[:8], "little")
    payload = memoryview(plain)[end:]
    entries = {_METADATA: {**metadata, _PAYLOAD_HASH: _hash(payload)}, **json.loads(plain[8:end])}
    entries[_METADATA][_HEADER_HASH] = _hash(canonical_json(entries))
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return b"".join([len(header).to_bytes(8, "little"), header, payload])


def safetensors_header(file: IO[bytes], size: int) -> dict[str, Any]:
    """Read the header of any safetensors file of `size` bytes; raise ValueError if it is damaged or incomplete."""
    length = int.from_bytes(file.read(8), "little")
    try:
        header = parse_json(file.read(min(length, size)))
        header[_METADATA] = dict(header.get(_METADATA, {}))
        end = 8 + length + max((header[name]["data_offsets"][1] for name in header if name != _METADATA), default=0)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError("its header is damaged") from error
    if end != size:
        raise ValueError("its size does not match its header")
    return header


def intact_metadata(header: Mapping[str, Any]) -> dict[str, str]:
    """Return the metadata in a header; raise ValueError if anything in it is not as it was written."""
    metadata = dict(header[_METADATA])
    stated = metadata.pop(_HEADER_HASH, None)
    if stated != _hash(canonical_json({**header, _METADATA: metadata})):
        raise ValueError("its header does not match its hash")
    return metadata


def intact_tensors(contents: bytes, metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """Return the tensors of a file with this intact metadata; raise ValueError if they are not those written."""
    start = 8 + int.from_bytes(contents[:8], "little")
    if metadata.get(_PAYLOAD_HASH) != _hash(memoryview(contents)[start:]):
        raise ValueError("its tensors do not match their hash")
    try:
        return from_safetensors(contents)
    except (SafetensorError, KeyError) as error:
        raise ValueError(str(error)) from error


def _hash(contents: bytes | memoryview) -> str:
    return hashlib.sha256(contents).hexdigest()
