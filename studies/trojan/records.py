"""Records of finished measurements, one JSON object per line, so that nothing is measured twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from sources import CACHE

Key = tuple[str, ...]


class Records:
    """Measurements by key, with a file for each name and settings.

    A line that an interruption cut off is dropped.
    """

    def __init__(self, name: str, settings: Mapping[str, Any]) -> None:
        digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=5).hexdigest()
        self.path = CACHE / f"{name}-{digest}.jsonl"
        self._found: dict[Key, dict[str, Any]] = {}
        text = self.path.read_text(encoding="utf-8") if self.path.is_file() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            self.path.write_text(whole, encoding="utf-8")
        for line in whole.splitlines():
            record = json.loads(line)
            self._found[tuple(record.pop("key"))] = record

    def __contains__(self, key: Key) -> bool:
        return key in self._found

    def __getitem__(self, key: Key) -> dict[str, Any]:
        return self._found[key]

    def __iter__(self) -> Iterator[Key]:
        return iter(self._found)

    def add(self, key: Key, record: dict[str, Any]) -> None:
        """Add a measurement, and append it to the file."""
        self._found[key] = record
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, **record}, ensure_ascii=False) + "\n")
