"""Generation, scoring and the key/value cache."""
