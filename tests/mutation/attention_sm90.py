"""Faults planted in Hopper's attention, which the tests run interpreted."""

from tests.mutation.mutant import Mutant, planted

FORMULA = "residuals"  # of the forward kernel, at head dims of 64, 128 and 256
WINDOWED, CAPPED, BLIND = (f"{FORMULA} and {D} and bfloat16" for D in ("True-70", "head-2", "200-65"))
TURNS = f"slow and {FORMULA} and 600-1000 and bfloat16"  # more key tiles than a ring has stages
GRADIENTS = "test_gradients"
PLAIN, WIDE = f"{GRADIENTS} and T200-S70", f"{GRADIENTS} and D256"
USED = 'used = j - start >= stages\n            pl.when(used)(lambda: self.wait("k free", slot))\n            here'
MUTANTS: list[Mutant] = [
    *planted(
        "ops/attention/pallas_sm90/fwd",
        "hopper",
        ("window one too wide", "jnp.uint32) < jnp.uint32(static.window)", "jnp.uint32) <= jnp.uint32(static.window)",
         WINDOWED),
        ("a query does not see itself", "along(column) <= down(last)", "along(column) < down(last)", BLIND),
        ("padded keys are seen", "visible = key < static.S", "visible = key <= static.S", CAPPED),
        ("top-left alignment", "(first + static.S - static.T - j", "(first - j", WINDOWED),
        ("the first tiles need no mask", "carry = lax.fori_loop(mine.start, mine.left, step(block.stop, masked=True)",
         "carry = lax.fori_loop(mine.start, mine.left, step(block.stop)", WINDOWED),
        ("the last tiles need no mask", "carry = lax.fori_loop(mine.right, mine.stop, step(block.stop, masked=True)",
         "carry = lax.fori_loop(mine.right, mine.stop, step(block.stop)", BLIND),
        ("sum without decay", "l = l * decay +", "l = l +", WINDOWED),
        ("output without decay", "acc = acc * across(decay, acc)", "acc = acc + 0 * across(decay, acc)", WINDOWED),
        ("gate without sigmoid", "jax.nn.sigmoid(plgpu.load(gate, layout=plgpu.Layout.WGMMA).astype(jnp.float32))",
         "plgpu.load(gate, layout=plgpu.Layout.WGMMA).astype(jnp.float32)", WINDOWED),
        ("a head's gate dropped", "acc = acc * across(gate)", "pass", CAPPED),
        ("cap does not restore the size", "static.softcap * LOG2E\n        elif", "LOG2E\n        elif", CAPPED),
        ("log-sum-exp without the largest", "m + jnp.log2(", "jnp.log2(", WINDOWED),
        ("no key gives NaN", "jnp.where(empty, 0.0, 1.0 / jnp.where(empty, 1.0, l))", "1.0 / l", BLIND),
        ("every head reads the first keys", "key_head = lax.div(self.head, jnp.int32(self.static.G))",
         "key_head = self.head * 0", CAPPED),
        ("both warpgroups write one tile",
         "rows = pl.ds(self.first + group * self.tiles.q, self.tiles.q)\n        ref =",
         "rows = pl.ds(self.first, self.tiles.q)\n        ref =", WINDOWED),
        ("values are not waited for", "self.wait(\"v here\", slot)\n        self.wait(\"turn\", group)\n        acc",
         "self.wait(\"turn\", group)\n        acc", WINDOWED),
        ("a stage is filled while in use", USED, USED.replace(">=", ">"), TURNS),
    ),
    *planted(
        "ops/attention/pallas_sm90/common",
        "hopper",
        ("window a key short", "first + offset - static.window + 1)", "first + offset - static.window + 2)", "span"),
        ("edge of the window unmasked", "past + offset - static.window + k - 1)", "past + offset - static.window)",
         "span"),
        ("diagonal unmasked", "tile(first + offset + 1)", "tile(first + offset + k)", "span"),
        ("padded queries see keys", "past = lax.min(first + rows, jnp.int32(static.T))", "past = first + rows", "span"),
    ),
    *planted(
        "ops/attention/pallas_sm90/vjp",
        "hopper",
        ("slope of the gate", "dgate * (open_ * (1 - open_))", "dgate * open_", "precedes"),
        ("delta of the gated cotangent", "gate.dtype), delta(inner)", "gate.dtype), delta(wide)", "precedes"),
        ("a head's gate gets one element's gradient", "dgate = jnp.sum(dgate, axis=-1, keepdims=True)",
         "dgate = dgate[..., :1]", "precedes"),
        ("the gate does not reach the kernel", "inner = wide * open_", "inner = wide", "precedes"),
    ),
    *planted(
        "ops/attention/pallas_sm90/dq_kernel",
        "hopper_backward",
        ("dq without scale", "(dq * static.scale)", "(dq * 1.0)", PLAIN),
        ("dq without delta", "p * (dp - across(delta))", "p * (dp - 0 * across(delta))", PLAIN),
    ),
    *planted(
        "ops/attention/pallas_sm90/common",
        "hopper_backward",
        ("slope of the cap", "1.0 - t * t", "1.0 - t", f"{GRADIENTS} and softcap5"),
        ("window one too wide", "[away < static.window + n", "[away <= static.window + n", f"{GRADIENTS} and window70"),
        ("a key does not see its own query", "[away >= n for n", "[away > n for n", PLAIN),
        ("queries that follow count as earlier", "range(0, -shape[1], -8)", "range(0, shape[1], 8)", PLAIN),
        ("all keys of a tile count as its first eight", "range(0, shape[1], 8) if", "[0] * (shape[1] // 8) if", PLAIN),
        ("the diagonal needs no mask", "inside.append(distance >= keys - 1)", "inside.append(distance >= 0)", PLAIN),
        ("segments by order", "down(of_row) == along(of_column)", "down(of_row) >= along(of_column)", WIDE),
        ("mixed tiles pass for one segment's", "(tile >= self.left) & (tile < self.right)",
         "(tile >= self.left) & (tile <= self.right)", WIDE),
        ("a key tile too few", "(shift - static.window + 1), 0)", "(shift - static.window + 2), 0)", "outside"),
        ("a query tile too few", "(static.window - 1 - shift)", "(static.window - 2 - shift)", "outside"),
    ),
    *planted(
        "ops/attention/pallas_sm90/dkv_kernel",
        "hopper_backward",
        ("dk without scale", "(dk * static.scale)", "(dk * 1.0)", PLAIN),
        ("dk without delta", "wait_n=1) - across(", "wait_n=1) - 0 * across(", PLAIN),
        ("the first head of a group twice", "h = g * G + lax.rem(i, jnp.int32(G))", "h = g * G", PLAIN),
        ("a stage is filled while in use", "pl.when(i >= tiles.q_stages)", "pl.when(i > tiles.q_stages)", PLAIN),
        ("p is taken before it is given", "plgpu.barrier_wait(p_full)", "pass", WIDE),
        ("wide: dk without delta", "dp = t_acc[...] - across(", "dp = t_acc[...] - 0 * across(", WIDE),
        ("wide: dv takes dk's scale", "jnp.where(makes_p, 1.0, static.scale)", "static.scale", WIDE),
    ),
]  # fmt: skip
