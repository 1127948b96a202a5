"""A small causal language model, trained from scratch: `headwater train lm`, `headwater generate`.

The way of a token: ``corpus`` (files to documents) → ``tokenizer`` (documents to uint16 arrays) →
``windows`` (arrays to batches) → ``worker`` (what ``common.trainer`` leaves to the recipe) → the run folder
(``common.checkpoint``). ``job`` prepares the folder and starts the processes, ``finish`` writes the report.
"""
