"""A small causal language model, trained from scratch: `headwater train lm`, `headwater generate`.

The way of a token: ``corpus`` (files to documents) → ``tokenizer`` (documents to uint16 arrays) →
``windows`` (arrays to batches) → ``worker`` (the training loop in each process) → ``checkpoint`` (the run
folder). ``job`` starts and watches the processes, ``board`` merges what the workers say, ``display`` shows it,
``finish`` writes the report.
"""
