"""A relay: one process that follows table sets, keeps copies of their versions, and serves readers with them."""
