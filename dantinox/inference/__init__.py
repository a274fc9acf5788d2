"""Generation, scoring and prefill of the KV cache."""
