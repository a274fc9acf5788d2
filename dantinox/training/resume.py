"""Resume a run: restore its state, find its text, and check which settings changed."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dantinox.checkpoint.manager import Checkpoints
from dantinox.checkpoint.train_state import TrainState
from dantinox.config import Config, ConfigError, TrainConfig, read_settings
from dantinox.data.corpus import STDLIB, Corpus, cached_corpus
from dantinox.data.tokenizer import DEFAULT_VOCAB, load_tokenizer
from dantinox.distributed.agreement import ask_first, together
from dantinox.metrics import logger as metrics_log
from dantinox.training.loop import LoopState
from dantinox.training.trainer import Trainer, load_data

Effect = Literal["none", "numbers", "impossible"]


class Start(NamedTuple):
    """What a run begins with; `state` is None for the initial weights."""

    trainer: Trainer
    state: TrainState | None
    step: int
    progress: LoopState


def resume_run(config: Config, saved: Config, run: Path, make_trainer: Callable[..., Trainer]) -> Start:
    """Restore a run from its latest valid checkpoint and quarantine newer, corrupt ones.

    Args:
        config: the settings to resume with.
        saved: the settings of the run.
        run: folder of the run, which process 0 has locked.
        make_trainer: `Trainer`.

    Raises:
        ConfigError: a changed setting would make another model.
        FileNotFoundError: the run got past its first checkpoint but has none.
        ValueError: all checkpoints are corrupt, or the text is not the one that the run was trained on.
    """
    if config.model.dtype == "auto":  # the dtype of the run, not of this device
        config = config.replace(dtype=saved.model.dtype)
    changed = diff_settings(config, saved)
    print_other_dtype(config)
    if absent := saved.flat().keys() - read_settings(run / "config.yaml").keys():
        print(f"config {run / 'config.yaml'} does not set {', '.join(sorted(absent))}; resuming with the defaults")
    checkpoints = Checkpoints(run, config.train.max_checkpoints)

    def latest_valid() -> tuple[int, dict[str, Any], list[str]] | None:
        if not checkpoints.steps():
            check_restart_from_scratch(run, config)
            return None
        step, metadata, errors = checkpoints.latest_valid()
        return step, metadata, list(map(str, errors))

    found = ask_first("newest checkpoint", latest_valid)
    if found is None:
        return Start(together("text", lambda: make_trainer(config), in_turn=True), None, 0, LoopState())
    step, metadata, errors = found
    trainer = together("text", lambda: trainer_for_text(config, run, metadata, make_trainer), in_turn=True)
    state = together("weights", lambda: checkpoints.restore(step, trainer.abstract_state()))
    for error in errors:
        print(f"{error}; resuming from step {step}")

    def quarantine_newer() -> None:
        for newer_step in [other for other in checkpoints.steps() if other > step]:
            print(f"moved it to {checkpoints.quarantine(newer_step)}")

    ask_first("damaged checkpoints", quarantine_newer)
    if changed:
        print(f"resumed with {changed}: later steps differ from those of an uninterrupted run")
    return Start(trainer, state, step, LoopState(**metadata["loop"]))


def print_other_dtype(config: Config) -> None:
    """Print the dtype of a run if it is not the one that auto is on this device."""
    dtype, here = config.model.resolved_dtype, config.replace(dtype="auto").model.resolved_dtype
    if dtype != here:
        print(f"resuming in {dtype}, the dtype of the run; --dtype auto of a new run is {here} here")


def check_restart_from_scratch(run: Path, config: Config) -> None:
    """Check that a run without a checkpoint may restart: it was killed before its first save.

    Raises:
        FileNotFoundError: the run got past its first checkpoint, so restarting would overwrite its metrics.
    """
    last_step = max((row["step"] for row in metrics_log.read_metrics(run / "metrics.jsonl")), default=0)
    if last_step > (config.train.save_every or config.train.steps):
        raise FileNotFoundError(f"run {run} has no checkpoint, although it reached step {last_step}")
    print(f"run {run} has no checkpoint yet; starting from scratch")


def trainer_for_text(
    config: Config, run: Path, metadata: dict[str, Any], make_trainer: Callable[..., Trainer]
) -> Trainer:
    """Return a trainer on the text that a run was trained on, wherever that text is now.

    If the file is gone, or the standard library is that of another Python, the prepared text in the cache replaces it.
    If the same text gives another tokenizer now, that of the run is used.

    Raises:
        FileNotFoundError: the text is gone.
        ValueError: the text is another one.
    """
    data, expected, missing = config.data.data, metadata["corpus"], None
    try:
        if config.data.tokenizer not in DEFAULT_VOCAB:  # that of the run, wherever its file is now
            corpus = corpus_of_tokenizer(config, run, metadata)
            if corpus is not None and corpus.content_id == expected:
                return make_trainer(config, corpus)
        trainer = make_trainer(config)
        if trainer.corpus.content_id == expected and has_tokenizer(trainer.corpus, metadata):
            return trainer
        corpus = corpus_of_tokenizer(config, run, metadata)
        if corpus is not None and expected in (trainer.corpus.content_id, corpus.content_id):
            return make_trainer(config, corpus)
    except FileNotFoundError as error:
        missing = error
    is_stdlib = data == STDLIB
    if (missing or is_stdlib) and (prepared := cached_corpus(expected)) and has_tokenizer(prepared, metadata):
        status = "is gone" if missing else "is that of another Python now"
        print(f"data {data!r} {status}; resuming with the text of the run from the cache, {prepared.path}")
        return make_trainer(config, prepared)
    advice = "resume with the Python it began with, or give that text with" if is_stdlib else "give the text with"
    advice += " --data PATH, or start another run"
    if missing:
        raise FileNotFoundError(f"{missing}; {advice}") from None
    raise ValueError(f"data {data!r} is not the text that run {run} was trained on; {advice}")


def has_tokenizer(corpus: Corpus, metadata: dict[str, Any]) -> bool:
    """Return whether a corpus has the tokenizer of a run; early checkpoints do not name theirs."""
    return metadata.get("tokenizer") in (None, corpus.tokenizer.fingerprint)


def corpus_of_tokenizer(config: Config, run: Path, metadata: dict[str, Any]) -> Corpus | None:
    """Return the text of the settings with the tokenizer in the folder of the run; None if that is not the run's."""
    try:
        tokenizer = load_tokenizer(run)
    except (OSError, ValueError):
        return None
    if tokenizer.fingerprint != metadata.get("tokenizer"):
        return None
    return load_data(config, tokenizer)


def resume_command(config: Config) -> str:
    """Return the command that resumes a run."""
    words = ["python", "-m", "dantinox.train", "--run", config.train.run]
    if config.train.runs_dir != TrainConfig().runs_dir:
        words += ["--runs-dir", config.train.runs_dir]
    return shlex.join([*words, "--resume"])


def diff_settings(config: Config, saved: Config) -> str:
    """Return the changed settings that change later steps, as `name old -> new; ...`; "" if there are none.

    Raises:
        ConfigError: naming each changed setting that a resumed run must keep.
    """
    new, old = config.flat(), saved.flat()
    changes: dict[Effect, list[str]] = {"none": [], "numbers": [], "impossible": []}
    for name in new:
        if new[name] != old[name]:
            effect = RESUME_EFFECTS[name]
            effect = effect if isinstance(effect, str) else effect(config, saved)
            changes[effect].append(f"{name} {old[name]!r} -> {new[name]!r}")
    if changes["impossible"]:
        raise ConfigError(f"--resume cannot change {'; '.join(changes['impossible'])}")
    return "; ".join(changes["numbers"])


def _effect_of_max_context(new: Config, old: Config) -> Effect:
    model = old.model
    if model.pos_encoding == "learned":  # one row of parameters per position
        return "impossible"
    scales_with_it = model.rope_scaling in ("yarn", "llama3") and model.rope_original_context is None
    return "numbers" if model.pos_encoding == "rope" and scales_with_it else "none"


def _effect_of_bpe_vocab_size(new: Config, old: Config) -> Effect:
    return "impossible" if old.data.tokenizer == "bpe" else "none"


def _effect_of_ema_decay(new: Config, old: Config) -> Effect:
    return "numbers" if new.optim.ema_decay and old.optim.ema_decay else "impossible"


def _effect_of_steps(new: Config, old: Config) -> Effect:
    return "none" if new.optim.schedule == "constant" and new.optim.warmup_ratio == 0 else "numbers"


# What --resume with another value of a setting does to later steps: "none", or other "numbers" (losses, weights), or it
# is "impossible": the model would be another one, or its state has no place for it. Every setting has an entry.
RESUME_EFFECTS: dict[str, Effect | Callable[[Config, Config], Effect]] = {
    # model
    "vocab_size": "none",  # training sets it from the tokenizer, whatever is given
    "dim": "impossible",
    "n_layers": "impossible",
    "n_heads": "impossible",
    "n_kv_heads": "impossible",
    "head_dim": "impossible",
    "max_context": _effect_of_max_context,
    "window": "impossible",
    "window_pattern": "impossible",
    "attn_gate": "impossible",
    "qk_norm": "impossible",
    "attn_bias": "impossible",
    "attn_sinks": "impossible",
    "attn_softcap": "impossible",
    "logit_softcap": "impossible",
    "pos_encoding": "impossible",
    "rope_theta": "impossible",
    "rope_scaling": "impossible",
    "rope_factor": "impossible",
    "rope_original_context": "impossible",
    "rope_truncate": "impossible",
    "mlp": "impossible",
    "mlp_limit": "impossible",
    "mlp_alpha": "impossible",
    "mlp_ratio": "impossible",
    "n_experts": "impossible",
    "experts_per_token": "impossible",
    "shared_expert": "impossible",
    "moe_bias": "impossible",
    "router_aux_loss_coef": "numbers",
    "router_z_loss_coef": "numbers",
    "tie_embeddings": "impossible",
    "dropout": "numbers",
    "norm_eps": "impossible",
    "dtype": "impossible",
    # These four compute the same in another order, so that sums are rounded differently.
    "remat": "numbers",
    "attn": "numbers",
    "moe": "numbers",
    "loss": "numbers",
    "decode": "none",  # of text samples only
    "kv_cache_dtype": "none",
    "lora_rank": "impossible",
    "lora_alpha": "impossible",
    "lora_targets": "impossible",
    # of single families
    "attn_out_bias": "impossible",
    "qk_norm_all_heads": "impossible",
    "norms": "impossible",
    "rope_pattern": "impossible",
    "rope_theta_windowed": "impossible",
    "attn_scale": "impossible",
    "norm_offset": "impossible",
    "scale_embeddings": "impossible",
    "n_dense_layers": "impossible",
    "dense_ratio": "impossible",
    "shared_ratio": "impossible",
    "router": "impossible",
    "router_renormalise": "impossible",
    "router_scale": "impossible",
    "selection_bias": "impossible",
    "selection_bias_rate": "numbers",
    # data
    "data": "none",  # the text may move; `trainer_for_text` compares its content
    "tokenizer": "impossible",
    "data_format": "impossible",
    "bpe_vocab_size": _effect_of_bpe_vocab_size,
    "val_fraction": "impossible",
    # optim
    "optimizer": "impossible",
    "lr": "numbers",
    "schedule": "numbers",
    "warmup_ratio": "numbers",
    "min_lr_ratio": "numbers",
    "weight_decay": "numbers",
    "beta1": "numbers",
    "beta2": "numbers",
    "grad_clip": "numbers",
    "ema_decay": _effect_of_ema_decay,
    # train
    "run": "none",
    "runs_dir": "none",
    "steps": _effect_of_steps,  # the schedule depends on their number
    "batch_size": "numbers",
    "seq_len": "numbers",
    "grad_accum": "numbers",
    "init_from": "impossible",
    "seed": "numbers",
    "mesh": "numbers",  # the order of sums
    "expert_exchange": "none",
    "eval_every": "none",
    "eval_batches": "numbers",  # of validation
    "patience": "none",
    "save_every": "none",
    "max_checkpoints": "none",
    "on_nan": "none",
    "sample_every": "none",
    "sample_tokens": "none",
    "log_every": "none",
    "profile_steps": "none",
    "wandb": "none",
}
