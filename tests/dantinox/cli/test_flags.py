"""Command lines as people write them: numbers, flags of other programs, positional words, typing errors."""

import importlib
import re
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dantinox import cli
from dantinox.cli import chat, evaluate, export, generate, train
from dantinox.cli.argv import normalize
from dantinox.cli.foreign_flags import NO_COUNTERPART, OTHER_NAMES
from dantinox.cli.suggestions import suggestion
from dantinox.config import Config, ConfigError
from dantinox.config.numbers import parse_int
from tests.helpers.documented_messages import message_pattern

PROGRAMS = {"train": train, "generate": generate, "evaluate": evaluate, "export": export, "chat": chat}


def flags_of(name: str) -> set[str]:
    program = importlib.import_module("dantinox.sweep.__main__") if name == "sweep" else PROGRAMS[name]
    fields = {name.rstrip("_") for name in program.Arguments.__dataclass_fields__}  # from is a word of Python
    return fields - {"settings"} | (set(Config().flat()) if name == "train" else set())


@pytest.mark.parametrize(
    ("text", "number"),
    {
        "1000": 1000, "1e3": 1000, "1E+3": 1000, "1.5e3": 1500, "1_000": 1000, "1,000": 1000, "12,345,678": 12345678,
        "1000.0": 1000, "-5": -5, "+5": 5, "120e-1": 12, "0": 0, "0.0": 0, " 7 ": 7, "1.5": None, "1e-3": None,
        "1.000": None, "1,00": None, "1,000.5": None, "": None, "x": None, "1k": None, "nan": None, "inf": None,
        "1e999": None, "1e9999999999": None, "9" * 5000: None, "0x10": None, "1e": None, "e3": None, "1__0": None,
        "1 000": None, "--": None, "1.5e0": None, ",100": None,
    }.items(),
)  # fmt: skip
def test_integers_in_common_spellings_are_exact_or_refused(text, number):
    assert parse_int(text) == number


@given(
    st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**6), max_value=10**6), st.integers(0, 9)
)
def test_scientific_spelling_is_the_integer_that_it_equals(mantissa, exponent):
    text = f"{mantissa}e{exponent}"
    exact = Fraction(mantissa) * 10**exponent
    assert parse_int(text) == (int(exact) if exact.denominator == 1 else None)


@pytest.mark.parametrize("text", ["1e3", "1_000", "1,000", "1000.0", "1.0e+3"])
def test_every_way_to_give_a_number_reads_the_same_spellings(text, tmp_path):
    arguments = cli.parse(
        train.Arguments, ["--steps", text], default=train.Arguments(Config()), prog="x", description=""
    )
    (tmp_path / "settings.yaml").write_text(f"steps: {text}\nwindow: 1e2\nlr: 1e-3\n")
    config = Config.from_yaml(tmp_path / "settings.yaml")
    assert arguments.settings.train.steps == config.train.steps == 1000
    assert (config.model.window, config.optim.lr) == (100, 1e-3)


TRAIN = {
    "--steps 1.5": "--steps is '1.5'; allowed: an integer",
    "--steps": "--steps needs a value",
    "--window 2.5": "--window is '2.5'; allowed: an integer or None",
    "--lr 0,1": "--lr is '0,1'; allowed: a number",
    "--qk-norm=maybe": "--qk-norm is 'maybe'; allowed: true, false or no value",
    "nano": "Unrecognized options: nano; did you mean --preset nano?",
    "steps=100": "Unrecognized options: steps=100; did you mean --steps?",
    "--steps 3 4": "Unrecognized options: 4; a value follows its flag, in quotes if it has spaces",
    "--run --resum": "--run needs a value; one with a hyphen in front is given as --run=--resum",
    "--max-iters 3 --batch=4": "Unrecognized options: --max-iters, --batch; --max-iters: did you mean --steps?; "
    "--batch: did you mean --batch-size (sequences per step, over all devices and micro-batches)?",
    "--num-samples 3": "Unrecognized options: --num-samples; --n is a flag of python -m dantinox.generate",
    "--top_k 3": "Unrecognized options: --top_k; --top-k is a flag of python -m dantinox.generate",
}


@pytest.mark.parametrize("line", TRAIN)
def test_invalid_line_is_refused_in_plain_words(line):
    with pytest.raises(ConfigError) as error:
        normalize(train.Arguments, line.split())
    assert str(error.value) == TRAIN[line]


def test_refused_flag_ends_the_program_with_the_documented_line(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--max-iters", "5"])
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert message_pattern("a flag of another trainer").fullmatch(err.strip())


MEANT = {
    "train": """learning_rate:lr learning-rate:lr max_iters:steps max-steps:steps batch:batch_size block_size:seq_len
    n_layer:n_layers n_head:n_heads n_embd:dim context-length:seq_len per_device_train_batch_size:batch_size
    gradient_accumulation_steps:grad_accum warmup_steps:warmup_ratio warmup_iters:warmup_ratio eval_interval:eval_every
    eval_iters:eval_batches log_interval:log_every logging_steps:log_every save_steps:save_every out_dir:runs_dir
    output_dir:runs_dir pretrained_model_name_or_path:init_from resume_from_checkpoint:resume
    max_grad_norm:grad_clip adam_beta2:beta2
    lr_scheduler_type:schedule save_total_limit:max_checkpoints wandb_log:wandb hidden_size:dim emb_dim:dim
    num_hidden_layers:n_layers base_num_decoder_layers:n_layers num_attention_heads:n_heads
    num_key_value_heads:n_kv_heads num_local_experts:n_experts num_experts_per_tok:experts_per_token
    sliding_window:window bf16:dtype
    max_target_length:seq_len train.max_seq_length:seq_len train.global_batch_size:batch_size optimizer.lr:lr
    clip_grad_norm:grad_clip gradient_clip_val:grad_clip accumulate_grad_batches:grad_accum dataset:data run_name:run
    model_name:preset wandb_project:wandb Steps:steps LR:lr batchsize:batch_size windw:window slidng_window:window
    stpes:steps tempratur: warm:warmup_ratio eval-evry:eval_every learnin_rate:lr sede:seed
    weigth_decay:weight_decay""",
    "generate": """num_samples:n num_return_sequences:n max_tokens:max_new_tokens length:max_new_tokens temp:temperature
    max_length:max_new_tokens start:prompt repeat_penalty:repetition_penalty stop_sequence:stop model:run
    model_name_or_path:run tempratur:temperature prmpt:prompt top_kk: ckpt_path:run""",
    "evaluate": "block_size:context dataset:data eval_batch_size:batch_size text:data model:run seq_len:context",
    "export": "output:out output_dir:out format:layout model_path:run max_shard_size:shard_mb",
    "sweep": "dryrun:dry_run debug:verbose",
}  # fmt: skip


@pytest.mark.parametrize(
    ("program", "name", "flag"),
    [(program, *pair.split(":")) for program, pairs in MEANT.items() for pair in pairs.split()],
)
def test_flag_of_another_program_or_typing_error_names_the_flag_meant(program, name, flag):
    hint = suggestion(name, flags_of(program))
    assert hint.startswith(f"did you mean --{flag.replace('_', '-')}") if flag else hint == ""


@pytest.mark.parametrize("name", "mode date node beta3 max_lr_ratio foo k min_k max_p x lrr data2 seeds2 mox".split())
def test_doubtful_name_gets_no_hint(name):
    assert suggestion(name, flags_of("train")) == ""


@pytest.mark.parametrize(
    "name", "epochs num_train_epochs device compile num_workers lr_decay_iters bias version".split()
)
def test_flag_without_counterpart_gets_the_reason(name):
    assert suggestion(name, flags_of("train")).startswith("there is none: ")


@pytest.mark.parametrize("program", [*PROGRAMS, "sweep"])
@pytest.mark.sampled(4)
def test_hints_name_flags_that_the_program_has(program):
    flags = flags_of(program)
    names = [name for names in (*OTHER_NAMES.values(), *NO_COUNTERPART) for name in names.split()]
    for hint in (suggestion(name, flags) for name in names):
        assert {flag.replace("-", "_") for flag in re.findall(r"--([a-z0-9-]+)", hint)} <= flags, hint


def test_table_names_flags_that_exist_and_each_name_once_per_flag():
    every = set().union(*map(flags_of, [*PROGRAMS, "sweep"]))
    assert set(OTHER_NAMES) <= every
    for flag, names in OTHER_NAMES.items():
        assert len(set(names.split())) == len(names.split()) and flag not in names.split(), flag


POSITIONAL = {
    "runs/nano 'def '": ["--run", "runs/nano", "--prompt", "def "],
    "runs/nano": ["--run", "runs/nano"],
    "runs/nano --prompt x": ["--run", "runs/nano", "--prompt", "x"],
    "--run x": ["--run", "x"],
    "": [],
}


@pytest.mark.parametrize("line", POSITIONAL)
def test_first_words_are_the_run_and_the_prompt(line):
    words = [word for word in line.replace("'def '", "def\xa0").split(" ") if word]
    words = [word.replace("\xa0", " ") for word in words]
    assert cli.positional_run(words, "--run", "--prompt") == POSITIONAL[line]


@pytest.mark.parametrize(
    ("words", "normal"),
    [
        (["--prompt", "- item"], ["--prompt=- item"]),
        (["--prompt", "-3"], ["--prompt=-3"]),
        (["--prompt", "-- a"], ["--prompt=-- a"]),
        (["--prompt", "a", "--prompt", "b"], ["--prompt", "a", "--prompt", "b"]),
        (["--stream", "true", "--top_k=1e1"], ["--stream", "--top-k=10"]),
        (["--stream=False"], ["--no-stream"]),
        (["--top-k", "none"], ["--top-k", "None"]),
        (["--lines"], ["--prompt-per-line"]),
    ],
)
def test_values_are_put_into_words_that_the_parser_takes(words, normal):
    assert normalize(generate.Arguments, words) == normal
    cli.parse(generate.Arguments, words, default=generate.Arguments(), prog="x", description="")
