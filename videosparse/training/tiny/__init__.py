"""Parts of `eval/train_tiny_model.py`, which trains the embedded tiny Wan model."""
