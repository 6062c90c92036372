"""A GGUF file as a checkpoint: its header, config, tokenizer and tensors."""
