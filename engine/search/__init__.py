"""Greedy and beam search on device tensors: sees logits, never the model."""
