"""A pretrained language model, trained on: `headwater finetune`."""
