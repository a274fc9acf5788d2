"""One decode step: append a token to the cache and attend to the visible tokens."""
