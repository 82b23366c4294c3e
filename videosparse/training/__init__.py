"""Training: the parts that the training programs in `lora/` and `eval/` are made of."""
