"""Time attention under pytest; `make bench BENCH=attention` writes a report as well."""

OP = "attention"


def test_attention(entry, replay):
    replay(entry)
