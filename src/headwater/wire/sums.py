"""Checksums of a version's part: one per block, and one of these that stands for the whole part."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import xxhash

from headwater.errors import ProtocolError
from headwater.wire.versions import SUM_BLOCK

Bytes = npt.NDArray[np.uint8]
Sums = npt.NDArray[np.uint64]
"""XXH3-64 of each ``SUM_BLOCK`` bytes; the last block may be shorter."""


def block_sum(part: Bytes, block: int) -> int:
    """The checksum of one block of a part."""
    return xxhash.xxh3_64_intdigest(part.data[block * SUM_BLOCK : (block + 1) * SUM_BLOCK])


def checksums(part: Bytes) -> Sums:
    """The checksums of all blocks of a part."""
    return np.array([block_sum(part, block) for block in range(blocks(len(part)))], dtype=np.uint64)


def blocks(size: int) -> int:
    """How many blocks a part of ``size`` bytes has."""
    return -(-size // SUM_BLOCK)


def digest(sums: Sums) -> int:
    """The checksum of the checksums."""
    return xxhash.xxh3_64_intdigest(pack(sums))


def pack(sums: Sums) -> bytes:
    """As they travel: 8 bytes each, little-endian."""
    return sums.astype("<u8").tobytes()


def unpack(data: bytes) -> Sums:
    """The inverse of ``pack``. Raises ``ProtocolError``."""
    if len(data) % 8:
        raise ProtocolError(f"checksums of 8 bytes each in {len(data)} bytes")
    return np.frombuffer(data, dtype="<u8").astype(np.uint64)


def damaged(part: Bytes, sums: Sums, chosen: Sequence[int] | range) -> list[int]:
    """Those of the ``chosen`` blocks whose checksum is not what it should be."""
    return [block for block in chosen if block_sum(part, block) != int(sums[block])]
