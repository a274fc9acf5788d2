"""Time the mixture of experts under pytest; `make bench BENCH=moe_mlp` writes a report as well."""

OP = "moe_mlp"


def test_moe_mlp(entry, replay):
    """Time one implementation of the mixture of experts on one workload."""
    replay(entry)
