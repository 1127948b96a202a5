"""What can be wrong with a data set of the catalog."""

from __future__ import annotations

from headwater.errors import DataError


class DataMissing(DataError):
    """The data set is not in the cache, or its carrier can be had neither here nor from a registry."""


class DataDamaged(DataError):
    """Files differ from those that the catalog knows: in the cache, or in the carrier."""
