"""Time attention under pytest; `make bench BENCH=attention` writes a report as well."""

OP = "attention"


def test_attention(entry, replay):
    """Time one implementation of attention on one workload."""
    replay(entry)
