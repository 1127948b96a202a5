"""The gateway: inference over HTTP with weights that stay current (``headwater serve``)."""
