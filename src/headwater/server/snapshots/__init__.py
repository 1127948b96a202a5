"""Snapshots: a consistent copy taken while training goes on, written so that a crash leaves the old or the new one.

    cut.py       a copy of some memory as it was at one moment, made behind the back of who writes to it
    capture.py   one shard's part: from its tables to a file, by two threads of its own
    disk.py      the few file operations that all of this is made of; tests record them and cut them short
    format.py    one shard's file: safetensors, with checksums that let a part be read and trusted alone
    files.py     writing it
    manifest.py  what makes files a snapshot: written last, renamed into place; and what is deleted after it
    opened.py    which snapshot is sound and to be used
    restore.py   back onto any number of shards
    export.py    plain files for other programs

A folder of snapshots looks so; one without ``manifest.json`` was not finished and does not count::

    snapshots/00000006/manifest.json
    snapshots/00000006/shard-00000.safetensors
    snapshots/00000007/…
"""
