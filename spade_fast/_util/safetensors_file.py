"""Safetensors files: writing them reproducibly, byte for byte, and reading their metadata without their tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import IO

from safetensors.torch import save as to_safetensors
from torch import Tensor


def safetensors_file(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return the bytes of a safetensors file, always the same for the same tensors and metadata.

    The safetensors library itself writes metadata with several keys in random order.
    """
    plain = to_safetensors(dict(tensors))
    end = 8 + int.from_bytes(plain[:8], "little")
    header = json.dumps({"__metadata__": dict(metadata), **json.loads(plain[8:end])}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return b"".join([len(header).to_bytes(8, "little"), header, memoryview(plain)[end:]])


def safetensors_metadata(file: IO[bytes], size: int) -> dict[str, str]:
    """Read the metadata of a safetensors file of `size` bytes; raise ValueError if it is damaged or incomplete."""
    length = int.from_bytes(file.read(8), "little")
    try:
        entries = json.loads(file.read(min(length, size)))
        metadata = entries.pop("__metadata__", {})
        end = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError("its header is damaged") from error
    if end != size:
        raise ValueError("its size does not match its header")
    return metadata
