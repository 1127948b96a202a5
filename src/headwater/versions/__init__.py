"""Versions: what is published and what names mean, leases, the parts that a process holds and how it makes them."""
