"""Time the linear cross-entropy under pytest; `make bench BENCH=linear_cross_entropy` writes a report as well."""

OP = "linear_cross_entropy"


def test_linear_cross_entropy(entry, replay):
    """Time one implementation of the linear cross-entropy on one workload."""
    replay(entry)
