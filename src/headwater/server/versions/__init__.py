"""Versions at whoever holds them, a server or a relay: their parts' memory, and how it is handed to readers."""
