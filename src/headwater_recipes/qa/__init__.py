"""Questions about a passage, answered with yes or no or by a span of it: `headwater train qa`."""
