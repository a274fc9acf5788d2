"""The cross-entropy of a linear projection to a vocabulary, without its logits."""
