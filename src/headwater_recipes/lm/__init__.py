"""A small causal language model, trained from scratch: `headwater train lm`, `headwater generate`."""
