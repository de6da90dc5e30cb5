"""The response cache: the same question to the same generation has the same answer.

Law of this file: a bounded map from request to answer; pure memory. Opt-in per model, because it
is right only for models without state. A worker serves one generation, so the generation is part
of the key by being the process. Keys hold the digest of the tensor data (BLAKE2b, 128 bits).
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict

# Bookkeeping of one entry beside its bytes: a key, a digest, a bytes object, three dict slots.
ENTRY_OVERHEAD_BYTES = 400


class ResponseCache:
    """Least recently used answers go first. Used by one thread."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._bytes = 0
        self._answers: OrderedDict[tuple[int, bytes], bytes] = OrderedDict()
        self.hits = 0
        self.misses = 0

    def __len__(self) -> int:
        return len(self._answers)

    @property
    def size_bytes(self) -> int:
        """What the entries take."""
        return self._bytes

    @staticmethod
    def key(serial: int, body: memoryview) -> tuple[int, bytes]:
        """The key of a request: its plan's serial number and the digest of its tensors."""
        return serial, hashlib.blake2b(body, digest_size=16).digest()

    def get(self, key: tuple[int, bytes]) -> bytes | None:
        """The answer's frame, or None."""
        answer = self._answers.get(key)
        if answer is None:
            self.misses += 1
            return None
        self._answers.move_to_end(key)
        self.hits += 1
        return answer

    def put(self, key: tuple[int, bytes], answer: memoryview) -> None:
        """Keep a copy of an answer, unless it alone is over the budget."""
        size = answer.nbytes + ENTRY_OVERHEAD_BYTES
        if size > self._bytes_max:
            return
        old = self._answers.pop(key, None)
        if old is not None:
            self._bytes -= len(old) + ENTRY_OVERHEAD_BYTES
        self._answers[key] = bytes(answer)
        self._bytes += size
        while self._bytes > self._bytes_max:
            _, dropped = self._answers.popitem(last=False)
            self._bytes -= len(dropped) + ENTRY_OVERHEAD_BYTES
