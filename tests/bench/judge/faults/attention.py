"""Classic faults of a flash attention, planted in docs/guides/my_attention.py.

Name -> (text of the file, which occurs once, what replaces it, features of which at least one must be named as wrong).
"""

FAULTS = {
    # The mask, and the tiles that it lets through
    "causal aligned top-left": (
        "query = self.S - self.T + i * TILE + iota(shape, 0)",
        "query = i * TILE + iota(shape, 0)",
        ("T < S", "T > S"),
    ),
    "causal without the own key": ("mask &= key <= query", "mask &= key < query", ("causal",)),
    "causal with the next key": ("mask &= key <= query", "mask &= key <= query + 1", ("causal",)),
    "causal mask forgotten": ("if self.causal:\n", "if False:\n", ("causal",)),
    "causal mask without causal": ("if self.causal:\n", "if True:\n", ("full",)),
    "window one too long": (
        "mask &= query - key < self.window",
        "mask &= query - key <= self.window",
        ("window",),
    ),
    "window one too short": (
        "mask &= query - key < self.window",
        "mask &= query - key < self.window - 1",
        ("window",),
    ),
    "window mask forgotten": ("mask &= query - key < self.window", "mask &= key > -1", ("window",)),
    "first key tile of a window skipped": (
        "first = 0 if self.window is None else query - self.window + 1",
        "first = 0 if self.window is None else query - self.window + TILE",
        ("window",),
    ),
    "first key tile of a window skipped by every query tile but the first": (
        "return jnp.maximum(first, 0) // TILE, jnp.minimum(last, self.S - 1) // TILE",
        "skip = 0 if self.window is None else jnp.where(i > 0, 1, 0)\n"
        "        return jnp.maximum(first, 0) // TILE + skip, jnp.minimum(last, self.S - 1) // TILE",
        ("window",),
    ),
    "last key tile of a causal mask skipped": (
        "last = query + TILE - 1 if self.causal else self.S - 1",
        "last = query if self.causal else self.S - 1",
        ("T < S", "T > S"),
    ),
    "key tiles of T == S": (
        "query = self.S - self.T + i * TILE\n",
        "query = i * TILE\n",
        ("T < S",),
    ),
    "query tiles of T == S": (
        "query = self.T - self.S + j * TILE  #",
        "query = j * TILE  #",
        ("T < S",),
    ),
    "last query tile of a window skipped": (
        "last = self.T - 1 if self.window is None else query + TILE + self.window - 2",
        "last = self.T - 1 if self.window is None else query + self.window - 1",
        ("window",),
    ),
    "grid of a window too short": (
        "min(tiles, pl.cdiv(TILE + self.window - 2, TILE) + 1)",
        "min(tiles, pl.cdiv(self.window, TILE))",
        ("window",),
    ),
    "padding keys not masked": (
        "mask = (query < self.S) & (key < self.S)",
        "mask = (query < self.S) & (key >= 0)",
        ("full", "odd sizes", "T > S", "several tiles"),
    ),
    "padding of the values not zeroed": (
        "v = zero_padding(v_ref[...], problem.S - j * TILE)",
        "v = v_ref[...]",
        ("odd sizes", "several tiles"),
    ),
    "padding of the queries not zeroed": (
        "q, do = (zero_padding(ref[...], problem.T - i * TILE) for ref in (q_ref, do_ref))",
        "q, do = q_ref[...], do_ref[...]",
        ("odd sizes", "several tiles"),
    ),
    "one padding key too many": (
        "iota((TILE, 1), 0) < rows_left",
        "iota((TILE, 1), 0) < rows_left - 1",
        ("odd sizes", "one tile", "full"),
    ),
    "last query tile not written": (
        "grid=(B, H, pl.cdiv(T, TILE), problem.steps(S)),",
        "grid=(B, H, max(1, T // TILE), problem.steps(S)),",
        ("several tiles", "odd sizes"),
    ),
    "last key tile left out": (
        "tiles = pl.cdiv(length, TILE)",
        "tiles = max(1, length // TILE)",
        ("several tiles", "odd sizes"),
    ),
    "unseen keys not zeroed": ("if window is not None or segment_ids is not None:", "if False:", ("unseen NaN",)),
    "only unseen values zeroed": (
        "k, v = jnp.where(seen, k, 0), jnp.where(seen, v, 0)",
        "v = jnp.where(seen, v, 0)",
        ("unseen NaN",),
    ),
    # The running softmax
    "accumulator not rescaled": (
        "acc_ref[...] = decay * acc_ref[...] + dot(",
        "acc_ref[...] = acc_ref[...] + dot(",
        ("several tiles",),
    ),
    "sum not rescaled": (
        "l_ref[...] = decay * l_ref[...] + jnp.sum",
        "l_ref[...] = l_ref[...] + jnp.sum",
        ("several tiles",),
    ),
    "decay upside down": ("decay = jnp.exp(m_ref[...] - m)", "decay = jnp.exp(m - m_ref[...])", ("several tiles",)),
    "maximum of the tile alone": (
        "m = jnp.maximum(m_ref[...], jnp.max(s, axis=1, keepdims=True))",
        "m = jnp.maximum(M_INIT, jnp.max(s, axis=1, keepdims=True))",
        ("segments", "T > S"),
    ),
    "maximum starts at minus infinity": (
        "m_ref[...] = jnp.full(m_ref.shape, M_INIT, jnp.float32)",
        "m_ref[...] = jnp.full(m_ref.shape, -jnp.inf, jnp.float32)",
        ("window", "segments", "T > S"),
    ),
    "accumulator not initialized": (
        "        acc_ref[...] = jnp.zeros_like(acc_ref)\n\n    @pl.when(j <= last)\n    def add_tile():\n        mask",
        "\n    @pl.when(j <= last)\n    def add_tile():\n        mask",
        ("float32", "one tile"),
    ),
    "sum not initialized": ("l_ref[...] = jnp.zeros_like(l_ref)", "pass", ("float32", "one tile")),
    "state initialized once per head": (
        "@pl.when(step == 0)\n    def init():\n        m_ref",
        "@pl.when((step == 0) & (i == 0))\n    def init():\n        m_ref",
        ("several tiles",),
    ),
    "a row without keys divides by zero": (
        "l = jnp.where(l_ref[...] == 0, 1, l_ref[...])",
        "l = l_ref[...]",
        ("T > S", "segments"),
    ),
    "output not divided": ("o_ref[...] = (acc_ref[...] / l).astype", "o_ref[...] = acc_ref[...].astype", ("float32",)),
    "lse without the maximum": (
        "lse_ref[...] = m_ref[...] + jnp.log(l)",
        "lse_ref[...] = jnp.log(l)",
        ("float32",),
    ),
    "lse in base 2": (
        "lse_ref[...] = m_ref[...] + jnp.log(l)",
        "lse_ref[...] = (m_ref[...] + jnp.log(l)) / 0.6931472",
        ("float32",),
    ),
    "probabilities rounded to 16 bits": (
        "acc_ref[...] = decay * acc_ref[...] + dot(p.astype(v.dtype), v, NN)",
        "acc_ref[...] = decay * acc_ref[...] + dot(p.astype(jnp.bfloat16).astype(v.dtype), v, NN)",
        ("float32",),
    ),
    "accumulator in 16 bits": (
        "acc_ref[...] = decay * acc_ref[...] + dot(p.astype(v.dtype), v, NN)",
        "acc = decay * acc_ref[...] + dot(p.astype(v.dtype), v, NN)\n"
        "        acc_ref[...] = acc.astype(jnp.bfloat16).astype(jnp.float32)",
        ("float32",),
    ),
    "default precision of float32 products": (
        "precision=matmul_precision(a, b), ",
        "",
        ("float32",),
    ),
    # Heads, scale, cap, segments
    "key head of another group": (
        "(b, h // (H // K), key_tile(i, step), 0)",
        "(b, h % K, key_tile(i, step), 0)",
        ("GQA",),
    ),
    "scale forgotten": ("s = dot(q, k, NT) * self.scale", "s = dot(q, k, NT)", ("float32", "scale")),
    "scale replaced by the default": (
        "s = dot(q, k, NT) * self.scale",
        "s = dot(q, k, NT) * q.shape[1] ** -0.5",
        ("scale",),
    ),
    "cap before the scale": (
        "s = dot(q, k, NT) * self.scale\n        return s if self.softcap is None else "
        "self.softcap * jnp.tanh(s / self.softcap)",
        "s = dot(q, k, NT)\n        return s * self.scale if self.softcap is None else "
        "self.scale * self.softcap * jnp.tanh(s / self.softcap)",
        ("soft cap",),
    ),
    "cap ignored": ("return s if self.softcap is None else", "return s if True else", ("soft cap",)),
    "cap not multiplied again": ("else self.softcap * jnp.tanh(s", "else jnp.tanh(s", ("soft cap",)),
    "segments compared with <=": ("mask & (q_ids == kv_ids)", "mask & (q_ids <= kv_ids)", ("segments",)),
    "segments ignored": ("mask & (q_ids == kv_ids)", "mask", ("segments",)),
    "segments of the first key tile": (
        "pl.BlockSpec((None, 1, TILE), lambda b, h, i, step: (b, 0, key_tile(i, step)))",
        "pl.BlockSpec((None, 1, TILE), lambda b, h, i, step: (b, 0, 0))",
        ("segments",),
    ),
    "segments of the first sequence": (
        "pl.BlockSpec((None, TILE, 1), lambda b, h, i, step: (b, i, 0))",
        "pl.BlockSpec((None, TILE, 1), lambda b, h, i, step: (0, i, 0))",
        ("segments",),
    ),
    # Gradients
    "delta forgotten": ("ds = p * (dot(do, v, NT) - delta)", "ds = p * dot(do, v, NT)", ("float32",)),
    "delta with the gated output": (
        "do.astype(jnp.float32) * o.astype(jnp.float32), axis=-1, keepdims=True) - dlse",
        "do.astype(jnp.float32) * o.astype(jnp.float32) * 0.5, axis=-1, keepdims=True) - dlse",
        ("float32",),
    ),
    "gradient of the log-sum-exp forgotten": ("keepdims=True) - dlse", "keepdims=True)", ("sinks",)),
    "scale forgotten in dq": (
        "dq_ref[...] = (acc_ref[...] * problem.scale)",
        "dq_ref[...] = (acc_ref[...])",
        ("float32", "scale"),
    ),
    "scale forgotten in dk": ("(dk_acc_ref[...] * problem.scale)", "(dk_acc_ref[...])", ("float32", "scale")),
    "scale twice in dk": (
        "(dk_acc_ref[...] * problem.scale)",
        "(dk_acc_ref[...] * problem.scale**2)",
        ("float32", "scale"),
    ),
    "cap forgotten in the gradient": ("if problem.softcap is not None:\n", "if False:\n", ("soft cap",)),
    "derivative of the cap without the square": (
        "ds *= 1 - (s / problem.softcap) ** 2",
        "ds *= 1 - jnp.abs(s / problem.softcap)",
        ("soft cap",),
    ),
    "gradients of masked scores": ("p = jnp.where(mask, jnp.exp(s - lse), 0)", "p = jnp.exp(s - lse)", ("causal",)),
    "dv in place of dp": ("dot(do, v, NT) - delta", "dot(do, do, NT) - delta", ("float32",)),
    "dk of the last head only": (
        "@pl.when((g == 0) & (step == 0))",
        "@pl.when(step == 0)",
        ("GQA",),
    ),
    "dk summed over the wrong heads": ("return b, h * G + g, jnp.clip", "return b, h + g * K, jnp.clip", ("GQA",)),
    "dq with the keys of another head": (
        "return b, h, i, h // G, jnp.clip",
        "return b, h, i, h % K, jnp.clip",
        ("GQA",),
    ),
    "dk and dv not initialized": ("dk_acc_ref[...] = jnp.zeros_like(dk_acc_ref)", "pass", ("float32", "one tile")),
    "dq not initialized": (
        "def init():\n        acc_ref[...] = jnp.zeros_like(acc_ref)",
        "def init():\n        pass",
        ("float32", "one tile"),
    ),
    "dv rounded to 16 bits": (
        "dv_acc_ref[...] += dot(p.astype(do.dtype), do, TN)",
        "dv_acc_ref[...] += dot(p.astype(jnp.bfloat16).astype(do.dtype), do, TN)",
        ("float32",),
    ),
    "gate's gradient without the derivative of the sigmoid": (
        " * jax.nn.sigmoid(x) * jax.nn.sigmoid(-x)",
        " * jax.nn.sigmoid(x)",
        ("gate per head", "gate per element"),
    ),
    "gate's gradient with half the derivative of the sigmoid": (
        " * jax.nn.sigmoid(x) * jax.nn.sigmoid(-x)",
        " * jax.nn.sigmoid(-x)",
        ("gate per head", "gate per element"),
    ),
    "gate's gradient not summed over the head": (
        "dgate = jnp.sum(dgate, axis=-1, keepdims=True)",
        "dgate = dgate[..., :1]",
        ("gate per head",),
    ),
    "gradient of the output without the gate": (
        "backward(problem, q, k, v, ids, o, lse, apply_gate(do, gate), dlse)",
        "backward(problem, q, k, v, ids, o, lse, do, dlse)",
        ("gate per head", "gate per element"),
    ),
    "gate of exp instead of sigmoid": (
        "(o * jax.nn.sigmoid(gate.astype(jnp.float32)))",
        "(o * jnp.exp(gate.astype(jnp.float32)))",
        ("gate per head", "gate per element"),
    ),
    "float16 accumulated in float16": (
        "q, k, v, gate = jax.tree.map(lambda x: x.astype(jnp.float32), (q, k, v, gate))",
        "q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))",
        ("float16",),
    ),
}
