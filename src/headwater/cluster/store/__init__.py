"""What the coordinator must remember: the contract is in ``base``, and each other file keeps it in its own way."""
