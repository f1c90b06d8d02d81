"""Token ids → logits: the model families, their tokenizers and chat formats, and how checkpoints load."""
