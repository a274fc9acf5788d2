"""Train Mistral and Mixtral of Hugging Face transformers one step per request; `bench.end_to_end --peer` runs this.

The program needs only torch and transformers. It reads "dense" or "moe" from standard input and answers with the
seconds of one step (forward, backward, clipping, AdamW).
"""

import json
import sys
import time

import torch
from transformers import MistralConfig, MistralForCausalLM, MixtralConfig, MixtralForCausalLM


def build(kind, sizes):
    """Return (model, optimizer) of "dense" or "moe" for the sizes of our model."""
    shared = {
        "vocab_size": sizes["vocab_size"],
        "hidden_size": sizes["dim"],
        "intermediate_size": int(sizes["dim"] * sizes["mlp_ratio"]),
        "num_hidden_layers": sizes["n_layers"],
        "num_attention_heads": sizes["n_heads"],
        "num_key_value_heads": sizes["n_kv_heads"],
        "max_position_embeddings": sizes["max_context"],
        "sliding_window": sizes["window"],
        "tie_word_embeddings": True,
        "use_cache": False,
    }
    if kind == "dense":
        model = MistralForCausalLM(MistralConfig(**shared))
    else:
        experts = {"num_local_experts": sizes["n_experts"], "num_experts_per_tok": sizes["experts_per_token"]}
        model = MixtralForCausalLM(MixtralConfig(**shared, **experts, output_router_logits=True))
    return model.train(), torch.optim.AdamW(model.parameters(), lr=1e-3)


def step(model, optimizer, tokens):
    """Train on tokens [batch, sequence] for one step; return its seconds."""
    start = time.perf_counter()
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    loss.item()
    return time.perf_counter() - start


def main():
    """Answer every line of standard input with the seconds of one step of that model."""
    torch.manual_seed(0)
    sizes = json.loads(sys.argv[1])
    models = {kind: build(kind, sizes) for kind in ("dense", "moe")}
    tokens = torch.randint(0, sizes["vocab_size"], (sizes["batch_size"], sizes["seq_len"]))
    for line in sys.stdin:
        print(step(*models[line.strip()], tokens), flush=True)


if __name__ == "__main__":
    main()
