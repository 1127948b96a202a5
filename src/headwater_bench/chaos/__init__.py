"""``headwater chaos``: a cluster of real processes under faults, and a count of what was lost or doubled.

`schedule.py` draws the faults from the seed, `runner.py` strikes and heals the processes of the rig, `pusher.py` pushes
and writes a ledger, `verdict.py` compares the ledgers with the sums, `report.py` says it.
"""

from headwater_bench.chaos.command import chaos

__all__ = ["chaos"]
