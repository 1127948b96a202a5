"""What recipes about text share: files to documents, documents to tokens, tokens to batches, scores, generated text.

``corpus`` (files to documents) → ``tokenizer`` (documents to uint16 arrays) → ``windows`` (arrays to batches) for a
stream of text; ``chats`` (files to chats) → ``examples`` (token arrays, with what is learnt from marked) → ``padded``
(batches of examples) for questions and answers. ``labelled`` (files to rows with labels) →
``classified`` (token arrays with labels) → ``encoder`` (a model with a head of classes) for what a text says, with
``classifying`` (the task), ``linear`` (its baselines), ``pictures`` and ``serving``. ``score`` and ``perplexity`` say
how good a model is, ``generation`` continues a prompt; ``settings`` and ``task`` are what is common to their recipes.
"""
