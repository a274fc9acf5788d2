"""Chat templates: Jinja programs that turn the messages of a chat into one text, rendered as transformers does.

Templates come with downloaded weights, so they run in Jinja's sandbox and see plain data only.
"""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

from dantinox.data.hf_tokenizer import HFTokenizer
from dantinox.data.tokenizer_protocol import Tokenizer

Message = Mapping[str, str]
"""{"role": "system", "user" or "assistant", "content": text}."""

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PLAIN = "{% for message in messages %}{{ message.content + '\\n' }}{% endfor %}"
"""Each message on a line: for models that continue texts and know no chats."""


END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end_of_turn|>", "<|eot|>", "<|return|>")
"""Tokens that end an answer, beside those that end a text."""


class ChatFormat(NamedTuple):
    """How a tokenizer writes chats.

    Attributes:
        text: the Jinja template.
        special_tokens: the tokens that it may name.
        prefix: ids before the text; none for a template of the tokenizer's own, which writes them.
        stop_ids: ids that end an answer.
        note: what to tell about the template; "" if the tokenizer has its own.
    """

    text: str
    special_tokens: Mapping[str, str]
    prefix: tuple[int, ...]
    stop_ids: tuple[int, ...]
    note: str


def chat_format(tokenizer: Tokenizer) -> ChatFormat:
    """Return how a tokenizer writes chats: by its template, in ChatML if it has <|im_end|>, else as plain text."""
    template, special_tokens, ends = None, {}, list(tokenizer.stop_ids)
    has_chatml = False
    if isinstance(tokenizer, HFTokenizer):
        ids = {token: tokenizer.library.token_to_id(token) for token in END_OF_TURN}
        ends += [i for i in ids.values() if i is not None]
        template, special_tokens = tokenizer.chat_template, tokenizer.special_tokens
        has_chatml = ids["<|im_end|>"] is not None
    note = ""
    if template is None and has_chatml:
        note = "no chat template: messages are in ChatML, for the tokenizer has <|im_end|>"
    elif template is None:
        note = "no chat template: the model continues the plain text, each message on a line"
    text = template or (CHATML if has_chatml else PLAIN)
    prefix = () if template else tuple(tokenizer.prefix)
    return ChatFormat(text, special_tokens, prefix, tuple(dict.fromkeys(ends)), note)


def render(
    template: str,
    messages: Sequence[Message],
    special_tokens: Mapping[str, str] | None = None,
    add_generation_prompt: bool = True,
) -> str:
    """Return the text of a chat.

    Args:
        template: text of the Jinja template.
        messages: the messages so far.
        special_tokens: values of variables such as bos_token and eos_token.
        add_generation_prompt: end with the beginning of the assistant's answer.

    Raises:
        ValueError: the template is invalid, or refuses the messages; the message is one line.
    """
    variables = dict(special_tokens or {}) | {"tools": None, "documents": None}
    try:
        return _compile(template).render(
            messages=[dict(message) for message in messages], add_generation_prompt=add_generation_prompt, **variables
        )
    except Exception as error:  # a template is a program: it may raise anything
        raise ValueError(f"the chat template fails: {' '.join(str(error).split()) or type(error).__name__}") from None


class _Generation(jinja2.ext.Extension):
    """The block `{% generation %}`, which marks what the assistant says and changes nothing."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace, without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args  # so that a variable may be called self
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace has no variable {name!r}: it begins with an underscore")


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Return JSON as it is; Jinja's own filter escapes characters of HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise jinja2.exceptions.TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    functions: dict[str, Any] = {
        "raise_exception": _raise,
        "strftime_now": _now,
        "namespace": _Namespace,
        "dict": lambda *args, **kwargs: dict(*args, **kwargs),
    }
    environment.globals.update(functions)
    return environment.from_string(template)
