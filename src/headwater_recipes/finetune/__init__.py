"""A pretrained language model, trained on: `headwater finetune`.

The way of an answer: ``data`` (files) or ``docstrings`` (the standard library) make chats and documents →
``examples`` (token arrays, with what is learnt from marked) → ``batches`` → ``worker`` (what ``common.trainer`` leaves
to the recipe) → the run folder. ``source`` finds and loads the model, ``adapter`` wraps it for LoRA, ``answers`` asks
it before and after, ``job`` prepares the folder and writes the report.
"""
