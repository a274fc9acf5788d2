"""Chat templates give the texts that transformers gives, and run in a sandbox."""

import json
from pathlib import Path

import pytest

from dantinox.data.chat_template import CHATML, PLAIN, render
from tests.dantinox.data.transformers_chats import CHATS, TEMPLATES, TOKENS

CASES = json.loads(Path(__file__).with_name("chat_templates.json").read_text("utf-8"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: "{template}-{chat}-{prompt}".format(**case))
def test_text_is_that_of_transformers(case):
    arguments = TEMPLATES[case["template"]], CHATS[case["chat"]], TOKENS, case["prompt"]
    if case["refused"] is None:
        assert render(*arguments) == case["text"]
    else:
        with pytest.raises(ValueError, match="the chat template fails: ") as error:
            render(*arguments)
        assert str(error.value) == f"the chat template fails: {case['refused']}"


def test_own_templates():
    messages = [*CHATS["system"], {"role": "assistant", "content": "Yes"}, {"role": "user", "content": "{{ a }}"}]
    assert render(CHATML, messages) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        "Yes<|im_end|>\n<|im_start|>user\n{{ a }}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert render(PLAIN, messages) == "Be brief.\nHi\nYes\n{{ a }}\n"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ messages.append(1) }}", "not safely callable|immutable|unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ namespace.__init__.__globals__ }}", "unsafe"),
        ("{% set x = namespace(_a=1) %}", "underscore"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
        ("{% include 'x' %}", "no loader"),
        ("{% if %}", "Expected an expression"),
        ("{{ messages[0].content.missing() }}", "no attribute|undefined"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ raise_exception('a\nb') }}", "fails: a b"),
    ],
)
def test_template_that_fails_is_one_line(template, reason):
    with pytest.raises(ValueError, match=f"the chat template fails.*({reason})|{reason}") as error:
        render(template, CHATS["one"])
    assert "\n" not in str(error.value)
