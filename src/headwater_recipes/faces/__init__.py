"""``headwater train faces``: whose face is it, and do two show one person? Of people whom the training never saw."""
