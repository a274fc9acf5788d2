"""Generate and evaluate on meshes of simulated devices and on one; run as a program with the number of devices set."""

import json
import sys
from typing import Any

import jax
import numpy as np
from flax import nnx

import dantinox
from dantinox.config import Config
from dantinox.distributed.inference import inference_mesh, kernels_on, mesh_of
from dantinox.distributed.mesh import parameter_shardings
from dantinox.inference import scoring
from dantinox.model.params import param_axes, split_params

SIZES = {"vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 8, "n_kv_heads": 4, "head_dim": 8}
TINY = SIZES | {
    "window": 6,
    "window_pattern": "SL",
    "max_context": 64,
    "seq_len": 64,
    "attn_gate": "head",
    "dtype": "float32",
}
SETTINGS: dict[str, dict[str, Any]] = {
    "xla": {"attn": "xla", "decode": "xla", "moe": "xla", "loss": "xla"},
    "pallas": {"attn": "pallas", "decode": "pallas", "moe": "pallas", "loss": "pallas"},
}
MIXTURE = {"n_experts": 4, "moe_bias": True, "mlp": "swiglu_clamped", "attn_sinks": True, "kv_cache_dtype": "int8"}
PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [10], [11, 12, 13], [14, 15]]


def main() -> None:
    """Compare the meshes of argv[2] with one device, by the implementations of argv[1]; --short leaves cases out."""
    short = "--short" in sys.argv
    for implementation in json.loads(sys.argv[1]):
        for more in (MIXTURE,) if short else ({}, MIXTURE):
            config = Config().replace(**(TINY | SETTINGS[implementation] | more))
            model_def, params = split_params(dantinox.Transformer(config.model, rngs=nnx.Rngs(0)))
            params = {name: 3 * x for name, x in params.items()}  # so that the likeliest tokens differ
            rng = np.random.default_rng(0)
            inputs, targets = (rng.integers(0, 64, (4, 16), dtype=np.int32) for _ in range(2))
            expected = None
            for mesh in ("", *json.loads(sys.argv[2])):
                laid = inference_mesh(mesh)
                placed = params
                if laid is not None:
                    placed = jax.device_put(params, parameter_shardings(param_axes(config.model), params, laid))
                model = model_def.merge(placed)
                assert mesh_of(nnx.state(model)) == laid
                found = [dantinox.generate(model, PROMPTS, max_new_tokens=12, temperature=0.0)]
                found.append(
                    dantinox.generate(model, PROMPTS[:1], max_new_tokens=12, temperature=0.8, n=3, speculate=2)
                )
                with kernels_on(laid):
                    losses = np.asarray(scoring._negative_log_probs(*nnx.split(model), inputs, targets))
                if expected is None:
                    expected, expected_losses = found, losses
                assert found == expected, (implementation, more, mesh)
                np.testing.assert_allclose(losses, expected_losses, atol=1e-4, err_msg=mesh)


if __name__ == "__main__":
    main()
