"""Time grouped matmul under pytest; `make bench BENCH=grouped_matmul` writes a report as well."""

OP = "grouped_matmul"


def test_grouped_matmul(entry, replay):
    """Time one implementation of grouped matmul on one workload."""
    replay(entry)
