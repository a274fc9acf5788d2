"""The generation program: prompts, streamed text, invalid input, Ctrl-C."""

import importlib
import io
import re
import subprocess
import sys

import pytest

import dantinox
from dantinox.cli.stream_printer import StreamPrinter, prompt_headers
from dantinox.data.tokenizer import BPETokenizer, CharTokenizer
from dantinox.inference import generate
from dantinox.inference.detokenizer import IncrementalDetokenizer
from dantinox.system import streams
from tests.dantinox.inference.test_generate import build


@pytest.fixture(scope="module")
def models():
    """Of the program's tests, which share what is compiled for them."""
    sizes = dict(n_layers=1, vocab_size=CharTokenizer("é€").vocab_size)
    return {"windowed": build(window=6, **sizes), "full": build(**sizes)}


@pytest.fixture
def program(models, monkeypatch, tmp_path):
    """dantinox.cli.generate.main in an empty folder, with a model that never was trained."""
    asked = []

    def load(run, **overrides):
        asked.append((str(run), overrides))
        if run.name == "none":
            raise FileNotFoundError(f"run {run} does not exist")
        return models["full" if run.name == "full" else "windowed"], CharTokenizer("é€")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dantinox.checkpoint.load.load", load)
    main = importlib.import_module("dantinox.cli.generate").main
    main.asked = asked
    return main


@pytest.fixture
def say(program, capsys):
    """The program's (stdout, stderr)."""

    def run(*words):
        program([str(word) for word in words])
        return capsys.readouterr()

    return run


def test_importing_the_program_keeps_generate_callable(models):
    importlib.import_module("dantinox.cli.generate")
    found = dantinox.generate(models["full"], [[1]], max_new_tokens=2)
    assert found == generate.generate(models["full"], [[1]], max_new_tokens=2)


def test_streamed_pieces_join_to_the_full_text(say, program):
    flags = ["--prompt", "né ", "--max-new-tokens", 40, "--temperature", 2, "--seed", 4, "--n", 2]
    whole = say("mine", *flags)
    assert say("--run", "runs/mine", *flags, "--stream", "--decode", "reference").out == whole.out
    assert program.asked == [("runs/mine", {}), ("runs/mine", {"decode": "reference"})]
    assert whole.out.startswith("--- sample 1 of 2 ---\nné ") and "\n--- sample 2 of 2 ---\nné " in whole.out
    assert re.match(r"\d+ tokens in \d+\.\d\d s, \d+ tokens/s, including compilation", whole.err)


def test_batched_prompts_equal_each_prompt_alone(say, tmp_path, monkeypatch):
    """Fault 14: a batch is padded on the left without a mask: a prompt gives another text than alone."""
    prompts = ["né ", "a longer one", "x"]
    flags = ["--max-new-tokens", 20, "--temperature", 1.5]
    alone = [say("--prompt", prompt, *flags).out for prompt in prompts]
    want = "".join(f"--- prompt {i} of 3 ---\n{text}" for i, text in enumerate(alone, 1))
    assert say(*[word for prompt in prompts for word in ("--prompt", prompt)], *flags).out == want
    (tmp_path / "prompts.txt").write_bytes("\r\n".join(prompts).encode() + b"\r\n")
    assert say("--prompt-file", "prompts.txt", "--prompt-per-line", *flags).out == want
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(prompts[1].encode())))
    assert say("--prompt-file", "-", *flags).out == alone[1]


@pytest.mark.parametrize("flags", [[], ["--stream", "--n", 2]])
@pytest.mark.parametrize("encoding", "ascii cp1252 latin-1 cp437 shift_jis utf-16 utf-8".split())
def test_text_outside_the_encoding_of_the_output_is_escaped(encoding, flags, program, say, monkeypatch):
    words = ["--prompt", "né 学 €", "--max-new-tokens", 30, "--temperature", 1.5, "--seed", 3, *flags]
    text = say(*words).out
    output = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, encoding, errors="strict", newline="\n"))
    with pytest.raises(SystemExit) as stop:
        streams.run_main(lambda _: program([str(word) for word in words]))
    assert stop.value.code == 0
    assert output.getvalue().decode(encoding) == text.encode(encoding, "backslashreplace").decode(encoding)
    if encoding == "utf-8":
        assert output.getvalue() == text.encode()


@pytest.mark.parametrize("flag", ["--prompt", "--stop"])
def test_argument_that_is_not_utf8_is_refused_and_bytes_of_utf8_are_read(flag, say, program, capsys):
    """A locale that is not UTF-8 stands for bytes by surrogates."""
    bytes_of = lambda text: text.encode().decode("ascii", errors="surrogateescape")
    flags = ["--prompt", "né ", "--max-new-tokens", 20, "--temperature", 1.5]
    assert say(*flags, flag, bytes_of("é€")).out == say(*flags, flag, "é€").out
    for text, byte in (("perch\udce9", "byte 5 is 0xe9"), ("\ud800", "byte 0 is 0xed")):
        with pytest.raises(SystemExit) as stop:
            program(["--run", "mine", flag, text])
        line = f"dantinox-generate: error: {flag[2:]} is not UTF-8 text: {byte}, a surrogate in the argument\n"
        assert (stop.value.code, capsys.readouterr()) == (2, ("", line))


def test_second_word_is_the_prompt(say):
    flags = ["--max-new-tokens", 5, "--temperature", 0]
    assert say("mine", "né ", *flags).out == say("--run", "mine", "--prompt", "né ", *flags).out


def test_missing_prompt_starts_a_document(say):
    first = say("--max-new-tokens", 5, "--temperature", 0).out
    ids = generate.generate(build(n_layers=1, vocab_size=259, window=6), [[0]], max_new_tokens=5, temperature=0.0)
    assert first == CharTokenizer("é€").decode(ids[0]) + "\n"


def test_stop_string_ends_the_text_before_it(say):
    flags = ["--prompt", "a", "--max-new-tokens", 60, "--temperature", 1.5, "--n", 2]
    samples = [part.split("---\n")[1] for part in say(*flags).out.split("--- sample ")[1:]]
    stop = samples[0][7:10]
    out = say(*flags, "--stop", "never there", "--stop", stop)
    cut = [part.split("---\n")[1] for part in out.out.split("--- sample ")[1:]]
    assert cut == [text.split(stop)[0].removesuffix("\n") + "\n" for text in samples]
    assert say(*flags, "--stop", stop, "--stream").out == out.out


def test_complete_returns_the_text_of_the_program(say, models):
    prompts, how = ["né ", "longer"], {"temperature": 1.5, "max_new_tokens": 30, "n": 2}
    flags = ["--temperature", 1.5, "--max-new-tokens", 30, "--n", 2]
    out = say(*(word for prompt in prompts for word in ("--prompt", prompt)), *flags).out
    want = [part.split(" ---\n", 1)[1].removesuffix("\n") for part in out.split("--- prompt ")[1:]]
    texts = dantinox.complete(models["windowed"], CharTokenizer("é€"), prompts, **how)
    assert [prompts[i // 2] + text for i, text in enumerate(texts)] == want and texts[0] != texts[1]
    stop = texts[2][5:8]
    cut = dantinox.complete(models["windowed"], CharTokenizer("é€"), prompts, stop=["not there", stop], **how)
    assert cut == [text.split(stop)[0] for text in texts]
    for bad, message in (
        ({"stop": [""]}, "stop contains ''; allowed: texts"),
        ({"stop": "x"}, "stop is 'x'; allowed: a list of texts"),
        ({"prompts": "x"}, "prompts is 'x'; allowed: a list of texts"),
        (
            {"prompts": ["a\udce9"]},
            "prompts contains 'a\\udce9', which has a surrogate; allowed: texts that UTF-8 encodes",
        ),
        ({"prompts": []}, "prompts are empty; allowed: at least one prompt"),
        ({"n": 0}, "n is 0; allowed: "),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            dantinox.complete(models["windowed"], CharTokenizer("é€"), **({"prompts": ["x"]} | bad))


def test_windowed_model_generates_past_max_context(say):
    """Fault 17: generation stops silently at the longest context."""
    out = say("--prompt", "a", "--max-new-tokens", 200, "--temperature", 0)
    assert out.err.startswith("200 tokens in ")


def test_full_attention_model_stops_at_max_context_with_a_message(say, program, capsys):
    """Fault 17: generation stops silently at the longest context."""
    out = say("--run", "full", "--prompt", "abc", "--temperature", 0)
    assert out.err.startswith("45 tokens in ") and len(out.out) > 10
    assert out.err.endswith("\nstopped at max_context 48: every layer has full attention\n")
    short = say("--run", "full", "--prompt", "abc", "--max-new-tokens", 5)
    assert "stopped" not in short.err
    for words, message in (
        (["--max-new-tokens", "46"], "a prompt of 3 tokens and max_new_tokens 46 make 49; allowed: max_context 48"),
        (["--prompt", "a" * 48], "the prompt is 48 tokens long; allowed: fewer than max_context 48 (every layer"),
    ):
        with pytest.raises(SystemExit):
            program(["--run", "full", "--prompt", "abc", *words])
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--run", "none"], "does not exist"),
        (["--top-k", "0"], "top_k is 0; allowed: an integer, 1 or more, or None"),
        (["--top-p", "1.5"], "top_p is 1.5; allowed: 0 < top_p <= 1"),
        (["--temperature", "nan"], "temperature is nan; allowed: a finite number"),
        (["--min-p", "1"], "min_p is 1.0"),
        (["--repetition-penalty", "0"], "repetition_penalty is 0.0"),
        (["--seed", "-1"], "seed is -1"),
        (["--prefill-chunk", "0"], "prefill_chunk is 0"),
        (["--n", "0"], "n is 0"),
        (["--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["--max-new-tokens", "many"], "many"),
        (["--prompt", "\udcff"], "surrogate"),
        (["--prompt", ""], "prompt is ''"),
        (["--prompt", "a", "--prompt", ""], "prompt is ''"),
        (["--stop", ""], "stop is ''"),
        (["--prompt-per-line"], "prompt_per_line needs prompt_file"),
        (["--prompt-file", "nowhere.txt"], "nowhere.txt: No such file or directory"),
        (["--prompt-file", "."], ".: Is a directory"),
        (["--prompt-file", "empty.txt"], "empty.txt is empty"),
        (["--prompt-file", "latin.txt"], "latin.txt is not UTF-8 text: byte 2 is 0xe9"),
        (["--prompt-file", "gap.txt", "--prompt-per-line"], "gap.txt: line 2 is empty"),
        (["--prompt-file", "gap.txt", "--prompt", "a"], "prompt and prompt_file are both given"),
        (["--tempratur", "1"], "--temperature"),
    ],
)
def test_invalid_input_prints_one_line_and_exits_2(program, capsys, tmp_path, flags, word):
    """Fault 15: empty prompts and top_k 0 are accepted silently."""
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "latin.txt").write_bytes("caé".encode("latin-1"))
    (tmp_path / "gap.txt").write_bytes(b"a\n\nb\n")
    with pytest.raises(SystemExit) as stop:
        program(flags)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert err.startswith("dantinox-generate: error: ") and err.count("\n") == 1 and word in err


def test_ctrl_c_keeps_the_text_generated_so_far(program, capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        yield generate.Chunk([[ord("a") + 1]], [False], [1])
        yield generate.Chunk([[ord("b") + 1, 0xE2 + 1]], [False], [2])  # and the first byte of a character
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "generate_chunks", interrupted)
    with pytest.raises(KeyboardInterrupt):
        program(["--prompt", ">"])
    assert capsys.readouterr().out == ">ab\ufffd\n"


# --- text on its way to the screen ---------------------------------------------------------------


def test_only_complete_characters_are_streamed():
    """Byte-level BPE spreads a character over tokens; half of one must not be shown."""
    left, middle, right = "€".encode()
    merges = ((left + 1, middle + 1),)  # a token that is no character
    for tokenizer, ids in (
        (CharTokenizer(""), [98, left + 1, middle + 1, right + 1, 99]),
        (BPETokenizer(merges), [98, 257, right + 1, 99]),
    ):
        text = IncrementalDetokenizer(tokenizer, "")
        shown = []
        for token in ids:
            text.add([token])
            shown.append(text.pop_ready())
        assert shown == ["a", *[""] * (len(ids) - 3), "€", "b"]


@pytest.mark.parametrize(
    ("stops", "shown", "done"),
    [
        (["cd"], "ab", True),
        (["x", "bc", "abcde"], "a", True),
        (["bcx"], "abcdefg\n", False),
        (["fgh"], "abcde", False),  # perhaps: held back, and shown at the end
        (["g"], "abcdef", True),
    ],
)
def test_stop_string_may_span_tokens(stops, shown, done):
    for pieces in (list("abcdefg"), ["abc", "defg"], ["abcdefg"]):
        text, seen = IncrementalDetokenizer(CharTokenizer(""), "", stops), ""
        for piece in pieces:
            text.add([ord(char) + 1 for char in piece])
            seen += text.pop_ready()
        assert (seen.removesuffix("\n") == shown.removesuffix("\n")) and text.done == done
        text.add([], done=True)
        assert seen + text.pop_ready() == (shown.removesuffix("\n") if done else "abcdefg") + "\n"


def test_several_streams_are_printed_in_order(capsys):
    tokenizer = CharTokenizer("")
    texts = [IncrementalDetokenizer(tokenizer, header, ["!"]) for header in prompt_headers(["p", "q"], 1)]
    printer = StreamPrinter(texts, stream=True)
    ids = lambda *words: [[ord(char) + 1 for char in word] for word in words]
    shown = []
    for words, done in ((("a", "x"), (False, False)), (("b", "y"), (False, True)), (("c!", ""), (False, True))):
        printer.add(ids(*words), done)
        shown.append(capsys.readouterr().out)
    assert shown == ["--- prompt 1 of 2 ---\npa", "b", "c\n--- prompt 2 of 2 ---\nqxy\n"]
    assert printer.done and [text.num_tokens for text in texts] == [4, 2]
    printer.finish()
    assert capsys.readouterr().out == ""


def test_python_m_runs_without_a_warning():
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "dantinox.generate", "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "--top-p" in done.stdout and done.stderr == ""
