"""Time cached decoding under pytest; `make bench BENCH=decode_attention` writes a report as well."""

OP = "decode_attention"


def test_decode_attention(entry, replay):
    """Time one implementation of decoding on one workload."""
    replay(entry)
