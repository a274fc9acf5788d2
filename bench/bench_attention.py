"""Attention: `pytest bench/bench_attention.py`, or with a report `make bench BENCH=attention`."""

OP = "attention"


def test_attention(entry, replay):
    replay(entry)
