"""Cached decoding: `pytest bench/bench_decode_attention.py`, or with a report `make bench BENCH=decode_attention`."""

OP = "decode_attention"


def test_decode_attention(entry, replay):
    replay(entry)
