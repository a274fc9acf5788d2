"""Faults planted in what all operations share: checks, dispatch, cost, the table of shapes."""

from tests.mutation.mutant import Mutant, planted

RULE = "keeps_the_rule"
MUTANTS: list[Mutant] = [
    *planted(
        "einsum",
        "attention",
        ("mean over grouped heads", "grad.sum(axis=", "grad.mean(axis=", f"{RULE} and 129 and float32"),
    ),
    *planted(
        "validation",
        "refusals",
        ("a window of 0 passes", "numbers.Integral) or value < 1", "numbers.Integral) or value < 0", "attention"),
        ("a window without causal passes", "    if not causal:", "    if False:", "attention"),
        ("3 heads on 2 pass", "K < 1 or H % K", "K < 1", "attention"),
        ("mixed dtypes pass", "if x.dtype != present[first].dtype:", "if False:", "attention"),
        ("negative caps pass", " and softcap > 0", "", "attention"),
    ),
    *planted(
        "dispatch",
        "refusals",
        ("silent fallback", "if reason: raise", "if reason: return self.implementations[1].function; raise", "says_why_not"),
        ("the target device is ignored", "_target_device = jax.make_user_context(default_value=None)",
         "import types; _target_device = type('Context', (), {'value': None, '__call__': lambda self, device: "
         "contextlib.ExitStack()})()", "traced_again"),
    ),
    *planted(
        "cost",
        "specs",
        ("triangle without its diagonal", "ramp * (ramp + 1) // 2", "ramp * (ramp - 1) // 2", "pairs"),
        ("keys behind the window are read", "min(S, T + window - 1)", "min(S, T + window)", "seen_keys"),
        ("segments' window one too wide", 'window, side="right"', 'window, side="left"', "segments"),
        ("idle groups are read", "rows * M + active * M * F + N * F", "rows * M + E * M * F + N * F", "grouped"),
        ("a full ring is read", "C if window is None else min(C, window)).sum()", "C).sum()", "decoding"),
    ),
    *planted(
        "workloads/types",
        "specs",
        ("queries are the first positions", "ids[:, n - self.T :]", "ids[:, : self.T]", "segment"),
        ("routes with the smallest share", "np.argsort(-scores, axis=1)", "np.argsort(scores, axis=1)", "route"),
        ("routes without chance", "1e-30)) + noise", "1e-30))", "route"),
    ),
]  # fmt: skip
