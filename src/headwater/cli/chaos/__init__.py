"""``headwater chaos``: a cluster of real processes under faults, and a count of what was lost or doubled.

`schedule.py` draws the faults from the seed, `cluster.py` holds the processes, `drill.py` strikes and heals,
`pusher.py` pushes and writes a ledger, `final.py` compares the ledgers with the sums, `report.py` says it.
"""

from headwater.cli.chaos.command import chaos

__all__ = ["chaos"]
