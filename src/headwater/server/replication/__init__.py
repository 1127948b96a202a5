"""The log of a shard and its copies: records, who follows whom, the log on disk, what a replica does with a record."""
