"""Decoding attention in Pallas for TPUs, interpreted on a CPU."""
