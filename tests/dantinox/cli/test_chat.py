"""The chat program: turns, commands, a full context, a pipe, and what the model reads."""

import importlib
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys

import pytest
from tokenizers import Tokenizer

from dantinox.data.hf_tokenizer import load_hf_tokenizer
from dantinox.data.tokenizer import CharTokenizer, load_tokenizer
from dantinox.hf.weights import load_hf, save_hf
from dantinox.inference.chat import Chat
from dantinox.inference.sampling import Sampling
from tests.dantinox.data.test_hf_tokenizer import byte_level
from tests.dantinox.data.transformers_chats import TEMPLATES
from tests.dantinox.inference.test_generate import build

main = importlib.import_module("dantinox.cli.chat").main
GREEDY = Sampling.create(0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with full attention and a tokenizer with <|im_start|>, but without a template."""
    place = tmp_path_factory.mktemp("chat")
    library: Tokenizer = byte_level()
    save_hf(build(n_layers=1, vocab_size=library.get_vocab_size(), max_context=96), place / "hf")
    library.save(str(place / "hf" / "tokenizer.json"))
    (place / "hf" / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    return place / "hf"


@pytest.fixture
def talk(folder, monkeypatch, capsys):
    """(exit code, stdout, stderr) of the program for lines of standard input."""
    monkeypatch.chdir(folder.parent)

    def run(text, *flags):
        monkeypatch.setattr(
            sys, "stdin", io.TextIOWrapper(io.BytesIO(text if isinstance(text, bytes) else text.encode()))
        )
        try:
            code = main(["hf", "--temperature", "0", *map(str, flags)])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


def with_template(folder, template):
    tokenizer = load_hf_tokenizer(folder)
    tokenizer.settings["chat_template"] = template
    return tokenizer


def test_every_turn_reads_the_whole_chat(folder):
    model, tokenizer = load_hf(folder), load_tokenizer(folder)
    chat, messages = Chat(model, tokenizer, GREEDY, system="Be brief."), [("system", "Be brief.")]
    text = ""
    for user in ("Hi", "é 漢 <|im_end|>?"):
        ids = list(chat.conversation.tokens)
        answer = "".join(chat.ask(user, 5))
        text = "<|im_start|>system\nBe brief.<|im_end|>\n" if not ids else text + "<|im_end|>\n"
        text += f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
        new = chat.conversation.tokens[len(ids) :]
        assert chat.ended == "count" and answer == tokenizer.decode(new[-5:])
        assert tokenizer.library.decode([*ids, *new[:-5]], skip_special_tokens=False) == text
        messages += [("user", user), ("assistant", answer)]
        text += answer
    assert [(message["role"], message["content"]) for message in chat.messages] == messages


def test_template_that_rewrites_the_past_is_read_again_where_it_differs(folder):
    """Templates drop the thoughts of earlier answers."""
    template = (
        "{% for m in messages %}{{ m.content if m.role == 'user' else m.content[:2] }}<|im_end|>{% endfor %}"
        "{{ raise_exception('no more') if messages | length > 3 }}"
    )
    model = load_hf(folder)
    chat, tokenizer = Chat(model, with_template(folder, template), GREEDY), load_tokenizer(folder)
    first = "".join(chat.ask("one two", 8))
    list(chat.ask("three", 8))
    text = f"one two<|im_end|>{first[:2]}<|im_end|>three<|im_end|>"
    ids = tokenizer.encode(text).tolist()
    assert chat.conversation.tokens[: len(ids)] == ids
    with pytest.raises(ValueError, match="the chat template fails: no more"):
        chat.ask("four", 8)
    assert len(chat.messages) == 4 and chat.messages[-1]["role"] == "assistant"


def test_stop_tokens_are_those_of_the_tokenizer_and_the_end_of_a_turn(folder):
    model = load_hf(folder)
    chat = Chat(model, load_tokenizer(folder), GREEDY)
    assert sorted(i for i in chat.conversation.stop_ids.tolist() if i >= 0) == [0, 2]
    assert chat.format.note == "no chat template: messages are in ChatML, for the tokenizer has <|im_end|>"
    assert Chat(model, with_template(folder, "x"), GREEDY).format.note == ""
    plain = Chat(build(n_layers=1, vocab_size=259, window=6), CharTokenizer("é€"), GREEDY)
    assert plain.format.note == "no chat template: the model continues the plain text, each message on a line"


def test_lines_of_a_pipe_are_messages_and_commands(talk, folder):
    chat = Chat(load_hf(folder), load_tokenizer(folder), GREEDY)
    answers = ["".join(chat.ask(message, 4)) for message in ("Hi", "é")]
    code, out, err = talk("Hi\n\né\r\n/help\n/nope\n/reset\nHi\n/quit\nnever\n", "--max-new-tokens", 4)
    assert (code, out) == (0, "".join(f"{answer}\n" for answer in [*answers, answers[0]]))
    assert "a new conversation\n" in err and "no command /nope\n/reset  start a new conversation\n" in err
    assert err.count("the answer ends here, after --max-new-tokens 4") == 3 and "never" not in err
    assert talk("")[:2] == (0, "")


def test_full_context_is_one_line_and_reset_helps(talk):
    code, out, err = talk("Hi\nHi\n/reset\nHi\n" + "long " * 200 + "\nHi\n")
    assert code == 0 and out.count("\n") >= 2
    assert err.count("the answer ends here, for the context of 96 tokens is full; /reset starts a new") == 2
    assert err.count("the context of 96 tokens is full (every layer has full attention): 96 so far and ") == 3
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        (b"a\n\xff\n", ["--max-new-tokens", 1], "line 2 of standard input is not UTF-8 text: byte 0 is 0xff"),
        ("a", ["--top-p", 2], "top_p is 2.0; allowed"),
        ("a", ["--max-new-tokens", 0], "max_new_tokens is 0; allowed: an integer, 1 or more"),
        ("a", ["--run", "x"], "run and from are both given"),
        ("a", ["--seed", -1], "seed is -1"),
        ("a", ["--system", "\udce9"], "system is not UTF-8 text"),
        ("a", ["--prompt", "x"], "Unrecognized options: --prompt"),
    ],
)
def test_invalid_input_is_one_line(talk, text, flags, message):
    code, _, err = talk(text, *flags)
    assert code == 2 and message in err.splitlines()[-1] and "Traceback" not in err


def test_template_of_the_folder_is_used(talk, folder):
    config = folder / "tokenizer_config.json"
    before = config.read_text()
    config.write_text(json.dumps({"eos_token": "<|endoftext|>", "chat_template": TEMPLATES["alternating"]}))
    try:
        assert talk("Hi", "--system", "Be brief")[2].endswith("Conversation roles must alternate user/assistant/...\n")
        code, _, err = talk("Hi", "--max-new-tokens", 2)
        assert code == 0 and "no chat template" not in err
    finally:
        config.write_text(before)


@pytest.mark.slow
def test_ctrl_c_at_a_terminal_stops_the_answer_and_ctrl_d_ends(tmp_path):
    """The answer would never end: every layer has a window."""
    save_hf(build(n_layers=1, window=6, vocab_size=259), tmp_path / "hf", tokenizer=CharTokenizer("é€"))
    terminal, end = pty.openpty()
    words = [sys.executable, "-m", "dantinox.chat", str(tmp_path / "hf"), "--max-new-tokens", "1000000"]
    program = subprocess.Popen(words, stdin=end, stdout=end, stderr=end)
    os.close(end)
    seen = b""

    def read_until(ending: bytes, more: int = 0) -> None:
        nonlocal seen
        begin = len(seen)
        while ending not in seen[begin:] or len(seen) - begin < more:
            assert select.select([terminal], [], [], 120)[0], seen
            seen += os.read(terminal, 4096)

    try:
        read_until(b"> ")
        for message in (b"Hi\n", b"More\n"):
            os.write(terminal, message)
            read_until(b"\n", more=200)
            program.send_signal(signal.SIGINT)
            read_until(b"\r\n> ")
        program.send_signal(signal.SIGINT)
        read_until(b"/quit or Ctrl-D ends")
        os.write(terminal, b"\x04")
        assert program.wait(60) == 0
    finally:
        program.kill()
        os.close(terminal)
