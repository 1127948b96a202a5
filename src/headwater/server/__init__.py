"""Servers: they hold the shards of the tables and apply the pushes."""

COORDINATOR = 0
"""The peer number of a server's connection to its coordinator."""
