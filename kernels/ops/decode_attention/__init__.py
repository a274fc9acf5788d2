"""One decoding step: append a token to the cache and attend to it."""
