"""Polarity of reviews, topics of posts, or classes of one's own: `headwater train sentiment`."""
