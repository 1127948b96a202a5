"""What Headwater costs and what it survives: ``headwater bench`` and ``headwater chaos``.

Each module that ``commands.BENCHES`` names measures one thing; ``rig`` starts clusters under faults, which ``chaos``,
``races`` and ``recovery`` strike. Nothing of Headwater imports this package: its commands hang in the command line by
entry points (``headwater.cli.plugins``).
"""
