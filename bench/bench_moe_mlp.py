"""The experts: `pytest bench/bench_moe_mlp.py`, or with a report `make bench BENCH=moe_mlp`."""

OP = "moe_mlp"


def test_moe_mlp(entry, replay):
    replay(entry)
