"""The data sets that tests train on."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import pytest

from headwater.errors import HeadwaterError
from headwater_recipes.data import cache
from headwater_recipes.data.carriers import Debian
from headwater_recipes.data.catalog import CATALOG
from headwater_recipes.data.errors import DataMissing


def need(name: str) -> Path:
    """The folder of a data set of the catalog, fetched if it is not there. Where it cannot be had the test is skipped.

    On a CI machine it fails, but for a Debian package that this machine's apt does not have: CI may run elsewhere.
    """
    found = _tried(name)
    if isinstance(found, Path):
        return found
    elsewhere = isinstance(CATALOG[name].carrier, Debian) and isinstance(found, DataMissing)
    if os.environ.get("CI") and not elsewhere:
        pytest.fail(f"the data set {name!r} cannot be had on this CI machine: {found}", pytrace=False)
    pytest.skip(f"the data set {name!r} is not here: {found}")


@functools.cache
def _tried(name: str) -> Path | HeadwaterError:
    """Without a network every try takes a while, so there is one."""
    try:
        return cache.get(name)
    except HeadwaterError as error:
        return error
