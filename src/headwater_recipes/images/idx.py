"""MNIST's file format (http://yann.lecun.com/exdb/mnist, "the IDX file format"), gzipped."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np

from headwater.errors import DataError
from headwater_recipes.images.decode import Pixels


def read_idx(path: Path, rank: int) -> Pixels:
    """The array of unsigned bytes in a file. ``rank``: how many dimensions it must have.

    Raises:
        DataError: there is no such file, or it is damaged, or holds another kind of array.
    """
    try:
        data = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: it cannot be read ({error})") from error
    header = 4 + 4 * rank
    if len(data) < header or data[:4] != bytes([0, 0, 8, rank]):
        raise DataError(f"{path}: not an IDX file of unsigned bytes in {rank} dimensions")
    shape = tuple(int(each) for each in np.frombuffer(data, ">u4", rank, 4))
    if len(data) != header + int(np.prod(shape, dtype=np.int64)):
        raise DataError(f"{path}: {len(data) - header:,} bytes of data are not the {shape} that its header says")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)
