"""Classic faults of decode attention, planted in docs/guides/my_decode_attention.py.

Name -> (text of the file, which occurs once, what replaces it, features of which at least one must be named as wrong).
"""

_VISIBLE = "visible = jnp.minimum(cache.length + 1, C if window is None else min(C, window))"
_RINGS = ("part-filled ring", "full ring", "wrapped ring")
FAULTS = {
    # The ring
    "slot of length % (C - 1)": (
        "newest = cache.length % C\n",
        "newest = cache.length % max(C - 1, 1)\n",
        ("full ring", "wrapped ring"),
    ),
    "slot of length + 1": (
        "newest = cache.length % C\n",
        "newest = (cache.length + 1) % C\n",
        ("part-filled ring", "empty ring"),
    ),
    "ring does not wrap": (
        "newest = cache.length % C\n",
        "newest = jnp.minimum(cache.length, C - 1)\n",
        ("wrapped ring",),
    ),
    "new token not counted": (
        _VISIBLE,
        "visible = jnp.minimum(cache.length, C if window is None else min(C, window))",
        ("part-filled ring", "empty ring"),
    ),
    "window counted from length instead of length + 1": (
        _VISIBLE,
        "visible = jnp.minimum(cache.length + 1, C if window is None else min(C, window + 1))",
        ("window",),
    ),
    "window one too short": (
        _VISIBLE,
        "visible = jnp.minimum(cache.length + 1, C if window is None else max(1, min(C, window - 1)))",
        ("window",),
    ),
    "window ignored": (_VISIBLE, "visible = jnp.minimum(cache.length + 1, C)", ("window",)),
    "full ring forgets its oldest token": (
        _VISIBLE,
        "visible = jnp.minimum(cache.length + 1, C - 1 if window is None else min(C, window))",
        ("full ring", "wrapped ring"),
    ),
    "length of the first sequence": (
        _VISIBLE,
        "visible = jnp.minimum(cache.length[:1] + 1, C if window is None else min(C, window)) + 0 * newest",
        ("part-filled ring", "ragged lengths"),
    ),
    "blocks not counted around the end": (
        "count = jnp.minimum(jnp.where(oldest > newest, count + blocks, count), blocks)",
        "count = jnp.clip(count, 1, blocks)",
        ("window", "wrapped ring"),
    ),
    "one block too few": (
        "count = newest // size - oldest // size + 1\n",
        "count = jnp.maximum(newest // size - oldest // size, 1)\n",
        ("part-filled ring", "full ring", "wrapped ring", "several blocks"),
    ),
    "grid of a window one step short": ("pl.cdiv(window, size) + 2", "pl.cdiv(window, size)", ("window",)),
    "blocks from the start of the ring": (
        "block = newest // size - step",
        "block = step + 0 * newest",
        ("part-filled ring", "full ring", "wrapped ring", "several blocks"),
    ),
    "block before the first one is the first": (
        "return jnp.where(block < 0, block + blocks, block)",
        "return jnp.maximum(block, 0)",
        ("wrapped ring", "full ring"),
    ),
    "number of whole blocks": (
        "blocks = pl.cdiv(C, size)",
        "blocks = C // size",
        ("part-filled ring", "full ring", "wrapped ring", "several blocks"),
    ),
    "slots counted within the block": (
        "return first + jax.lax.broadcasted_iota(jnp.int32, shape, axis)",
        "return jax.lax.broadcasted_iota(jnp.int32, shape, axis)",
        ("part-filled ring", "full ring", "wrapped ring", "several blocks"),
    ),
    "age does not wrap": (
        "age = jnp.where(slot <= newest, newest - slot, newest - slot + C)",
        "age = jnp.where(slot <= newest, newest - slot, C)",
        ("wrapped ring", "full ring"),
    ),
    "age wraps one early": (
        "newest - slot, newest - slot + C)",
        "newest - slot, newest - slot + C - 1)",
        ("part-filled ring", "wrapped ring", "window"),
    ),
    "padding slots not masked": (
        "return (age < visible) & (slot < C)",
        "return age < visible",
        ("part-filled ring", "full ring", "wrapped ring", "several blocks"),
    ),
    "one token too many": ("return (age < visible)", "return (age <= visible)", ("part-filled ring", "empty ring")),
    "unseen slots are attended to": ("return (age < visible) & (slot < C)", "return slot < C", ("part-filled ring",)),
    "unseen values not zeroed": ("v = jnp.where(is_visible(slot), v, 0)", "v = v + 0", ("unseen NaN", "odd sizes")),
    # The new token
    "new token not attended to": (
        "return (age < visible)",
        "return (age > 0) & (age < visible)",
        ("empty ring", *_RINGS),
    ),
    "attends to the old key of the slot": (
        "s = dot(q_ref[...], k, NT) * scale",
        "s = dot(q_ref[...], k_ref[...], NT) * scale",
        ("part-filled ring", "full ring"),
    ),
    "attends to the old value of the slot": (
        "v = jnp.where(is_visible(slot), v, 0)",
        "v = jnp.where(is_visible(slot), v_ref[...], 0)",
        ("part-filled ring", "full ring"),
    ),
    "key not appended": ("k_out_ref[...] = k\n", "k_out_ref[...] = k_ref[...]\n", ("part-filled ring",)),
    "value appended as the key": ("v_out_ref[...] = v\n", "v_out_ref[...] = k\n", ("part-filled ring",)),
    "appended at every block": (
        "@pl.when(step == 0)\n        def append():",
        "@pl.when(step >= 0)\n        def append():",
        ("part-filled ring", "full ring", "wrapped ring", "several blocks"),
    ),
    "block of the new token written over": (
        "k_out_ref[...] = k\n",
        "k_out_ref[...] = jnp.where(slot == newest, k, 0)\n",
        ("part-filled ring",),
    ),
    "new block is the first one": (
        "return b, 0, newest[b] // size, 0",
        "return b, 0, 0, 0",
        ("part-filled ring", "full ring", "wrapped ring", "several blocks"),
    ),
    # The running softmax
    "accumulator not rescaled": (
        "acc_ref[...] = decay * acc_ref[...] +",
        "acc_ref[...] = acc_ref[...] +",
        ("part-filled ring", "full ring", "wrapped ring", "several blocks"),
    ),
    "sum not rescaled": (
        "l_ref[...] = decay * l_ref[...] +",
        "l_ref[...] = l_ref[...] +",
        ("part-filled ring", "full ring", "wrapped ring", "several blocks"),
    ),
    "decay upside down": (
        "decay = jnp.exp(m_ref[...] - m)",
        "decay = jnp.exp(m - m_ref[...])",
        ("part-filled ring", "full ring", "wrapped ring", "several blocks"),
    ),
    "state of the sequence before": (
        "@pl.when(step == 0)\n    def init():",
        "@pl.when((step == 0) & (b == 0))\n    def init():",
        ("ragged lengths",),
    ),
    "accumulator not initialized": ("acc_ref[...] = jnp.zeros_like(acc_ref)", "pass", _RINGS),
    "maximum not stored": (
        "        m_ref[...] = m\n",
        "",
        ("part-filled ring", "full ring", "wrapped ring", "several blocks"),
    ),
    "output not divided": ("o = acc_ref[...] / l_ref[...]", "o = acc_ref[...]", _RINGS),
    "written at the first block": (
        "@pl.when(step == pl.num_programs(1) - 1)\n    def write():",
        "@pl.when(step == 0)\n    def write():",
        ("part-filled ring", "full ring", "wrapped ring", "several blocks"),
    ),
    "probabilities rounded to 16 bits": (
        "dot(p.astype(v.dtype), v, NN)",
        "dot(p.astype(jnp.bfloat16).astype(v.dtype), v, NN)",
        ("part-filled ring", "float32"),
    ),
    "accumulator in 16 bits": (
        "acc_ref[...] = decay * acc_ref[...] + dot(p.astype(v.dtype), v, NN)",
        "acc = decay * acc_ref[...] + dot(p.astype(v.dtype), v, NN)\n"
        "        acc_ref[...] = acc.astype(jnp.bfloat16).astype(jnp.float32)",
        ("float32",),
    ),
    "default precision of float32 products": ("precision=matmul_precision(a, b), ", "", ("float32",)),
    # Scale, cap, gate, heads
    "scale forgotten": ("s = dot(q_ref[...], k, NT) * scale", "s = dot(q_ref[...], k, NT)", ("scale", *_RINGS)),
    "scale applied twice": (
        "s = dot(q_ref[...], k, NT) * scale",
        "s = dot(q_ref[...], k, NT) * scale**2",
        ("scale", *_RINGS),
    ),
    "scale replaced by the default": (
        "s = dot(q_ref[...], k, NT) * scale",
        "s = dot(q_ref[...], k, NT) * q_ref.shape[-1] ** -0.5",
        ("scale",),
    ),
    "cap ignored": ("if softcap is not None:\n", "if False:\n", ("soft cap",)),
    "cap not multiplied again": ("s = softcap * jnp.tanh(s / softcap)", "s = jnp.tanh(s / softcap)", ("soft cap",)),
    "cap after the mask": (
        "s = jnp.where(is_visible(slots((1, 1, size), 2)), s, -jnp.inf)",
        "s = jnp.where(is_visible(slots((1, 1, size), 2)), s, -jnp.inf if softcap is None else -softcap)",
        ("soft cap",),
    ),
    "gate ignored": ("if gate_ref:\n", "if False:\n", ("gate per head", "gate per element")),
    "gate without the sigmoid": (
        "o *= jax.nn.sigmoid(gate_ref[0][...].astype(jnp.float32))",
        "o *= gate_ref[0][...].astype(jnp.float32)",
        ("gate per head", "gate per element"),
    ),
    "gate of the first head": (
        "o *= jax.nn.sigmoid(gate_ref[0][...].astype(jnp.float32))",
        "o *= jax.nn.sigmoid(gate_ref[0][:1].astype(jnp.float32))",
        ("gate per head", "gate per element"),
    ),
    "gate of the first element": (
        "o *= jax.nn.sigmoid(gate_ref[0][...].astype(jnp.float32))",
        "o *= jax.nn.sigmoid(gate_ref[0][:, :, :1].astype(jnp.float32))",
        ("gate per element",),
    ),
    "heads of a group interleaved": (
        "inputs, in_specs = [q.reshape(B, K, G, D), k",
        "inputs, in_specs = [q.reshape(B, G, K, D).swapaxes(1, 2), k",
        ("GQA",),
    ),
}
