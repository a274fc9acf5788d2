"""Grouped matmul: `pytest bench/bench_grouped_matmul.py`, or with a report `make bench BENCH=grouped_matmul`."""

OP = "grouped_matmul"


def test_grouped_matmul(entry, replay):
    replay(entry)
