"""Teacher adapters, one LoRA a task: the bank on disk, its training and its import."""
