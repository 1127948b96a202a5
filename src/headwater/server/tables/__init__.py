"""What a table holds on one shard, by kind: ``base.py`` says what a shard needs of any, ``kinds.py`` lists them."""
