"""What the processes of a run agree on, through the store of the coordination service.

No function here uses a device, so threads may call them. Each has a time limit, and ends at once if another process has
failed. With one process they only do the work.
"""

import contextlib
import hashlib
import io
import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from jax.errors import JaxRuntimeError

from dantinox.distributed import processes

LIMIT_S = 1800.0  # that a process waits for the others
TURN_LIMIT_S = 86400.0  # for one that works before or after the others: it may tokenize a large text
POLL_MS = 500
ROOT = "dantinox"  # of the keys


class AgreedError(Exception):
    """Another process has failed, or all have.

    Attributes:
        code: the exit code.
        silent: process 0 speaks of it.
    """

    def __init__(self, message: str, code: int = 1, *, silent: bool = True) -> None:
        super().__init__(message)
        self.code, self.silent = code, silent


failure: AgreedError | None = None  # of another process, set by the watch
_rounds: Counter[str] = Counter()
_counting = threading.Lock()
_settled: BaseException | None = None


def describe(index: int) -> str:
    """Return a name of a process for messages."""
    return f"process {index}" + (f" on {hosts[index]}" if index < len(hosts) else "")


hosts: list[str] = []


def gather(topic: str, value: Any, limit_s: float | None = None, abort_key: str | None = None) -> list[Any]:
    """Return the values of all processes, in their order; all call it with the same topic, in the same order.

    Args:
        topic: what it is about; other topics may be gathered at the same time by other threads.
        value: a JSON value.
        limit_s: seconds to wait, by default `LIMIT_S`.
        abort_key: a key that ends the wait once a process has set it.

    Raises:
        AgreedError: a process has failed, or was not there in time.
    """
    with _counting:
        number = _rounds[topic]
        _rounds[topic] += 1
    store, own = processes.client(), processes.index()
    limit_s = LIMIT_S if limit_s is None else limit_s
    folder, before = f"{ROOT}/{topic}/{number}", f"{ROOT}/{topic}/{number - 1}"
    deadline = time.monotonic() + limit_s
    if own:
        store.key_value_set(f"{folder}/{own}", json.dumps(value))
        values = json.loads(_get(f"{folder}/all", deadline, abort_key, f"{describe(0)} was not at {topic!r}"))
        store.key_value_delete(f"{folder}/{own}")
        return values
    values = [value]
    for other in range(1, processes.count()):
        late = f"{describe(other)} was not at {topic!r} in {limit_s:.0f} s"
        values.append(json.loads(_get(f"{folder}/{other}", deadline, abort_key, late)))
    store.key_value_set(f"{folder}/all", json.dumps(values))
    if number:  # whoever has come to this round has read the one before
        store.key_value_delete(f"{before}/all")
    return values


def _get(key: str, deadline: float, abort_key: str | None, late: str) -> str:
    store = processes.client()
    while True:
        try:
            return store.blocking_key_value_get(key, POLL_MS)
        except JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise AgreedError(f"{describe(0)} is not there any more", silent=False) from None
        if failure is not None:
            raise failure
        if abort_key is not None:
            with contextlib.suppress(JaxRuntimeError):  # there is no such key
                raise AgreedError(store.key_value_try_get(abort_key))
        if time.monotonic() > deadline:
            raise AgreedError(late, silent=False)


def together[T](topic: str, work: Callable[[], T], *, in_turn: bool = False, quiet: bool = False) -> T:
    """Return what `work` returns in this process; if it fails in one process, raise in all.

    The error is raised as it is in the first process that had one, and as an `AgreedError` in the others.

    Args:
        topic: as in `gather`.
        work: what each process does.
        in_turn: process 0 is first, and fills a cache for the others.
        quiet: an error that process 0 prints to standard error, too, is not printed by the others.
    """
    if processes.count() == 1:
        return work()
    limit_s = TURN_LIMIT_S if in_turn else None
    if in_turn and not processes.is_first():
        gather(f"{topic} in process 0", None, limit_s)
    result, error, said = None, None, io.StringIO()
    hidden = contextlib.redirect_stderr(said) if quiet and not processes.is_first() else contextlib.nullcontext()
    try:
        with hidden:
            result = work()
    except (Exception, SystemExit) as caught:
        error = caught
    if in_turn and processes.is_first():
        gather(f"{topic} in process 0", None, limit_s)
    outcome = None if error is None else [said.getvalue().strip() or message_of(error), exit_code(error)]
    outcomes = gather(topic, outcome, limit_s)
    failed = next((i for i, other in enumerate(outcomes) if other is not None), None)
    if failed is None or failed == processes.index():
        sys.stderr.write(said.getvalue())
    if failed is None:
        return result  # type: ignore[return-value]
    if failed == processes.index() and error is not None:
        raise settled(error)
    text, code = outcomes[failed]
    raise settled(AgreedError(f"{describe(failed)}: {text}", code))


def ask_first[T](topic: str, question: Callable[[], T], share: bool = True) -> T:
    """Return what `question`, a JSON value, returns in process 0; its error is raised in all.

    Args:
        topic: as in `gather`.
        question: called in process 0 only.
        share: False: the answer is not JSON, and None in the others.
    """
    if processes.count() == 1:
        return question()
    answer, error = None, None
    if processes.is_first():
        try:
            answer = question()
        except (Exception, SystemExit) as caught:
            error = caught
    outcome = {"error": message_of(error), "code": exit_code(error)} if error else {"answer": answer if share else None}
    shared = gather(topic, outcome)[0]
    if error is not None:
        raise settled(error)
    if "error" in shared:
        raise settled(AgreedError(f"{describe(0)}: {shared['error']}", shared["code"]))
    return answer if processes.is_first() else shared["answer"]  # type: ignore[return-value]


def first_failure(topic: str, reason: str | None) -> str | None:
    """Return why something failed in the first process in which it did, or None.

    Args:
        topic: as in `gather`.
        reason: why it failed in this process, or None.
    """
    reasons = gather(topic, reason)
    failed = next((i for i, other in enumerate(reasons) if other is not None), None)
    return None if failed is None else f"{describe(failed)}: {reasons[failed]}"


def check_same(facts: Mapping[str, Any]) -> None:
    """Check that all processes have the same facts, JSON values by name.

    Raises:
        ValueError: the message names the first difference and its process.
    """
    if processes.count() == 1:
        return
    text = json.dumps(dict(facts), sort_keys=True)
    digests = gather("start-up check", hashlib.sha256(text.encode()).hexdigest())
    differs = next((index for index, digest in enumerate(digests) if digest != digests[0]), None)
    if differs is None:
        return
    shown = gather("difference", text if processes.index() in (0, differs) else None)
    first, other = json.loads(shown[0]), json.loads(shown[differs])
    name = next(name for name in first | other if first.get(name) != other.get(name))
    raise everywhere(
        ValueError(f"{describe(differs)} differs from process 0: {name} {other.get(name)!r}, not {first.get(name)!r}")
    )


def everywhere[E: BaseException](error: E) -> E | AgreedError:
    """Return the error to raise for one that all processes have at the same moment: process 0 speaks of it."""
    return settled(error if processes.is_first() else AgreedError(str(error), exit_code(error)))


def settled[E: BaseException](error: E) -> E:
    """Return the error, of which the other processes know."""
    global _settled
    _settled = error
    return error


def is_settled(error: BaseException | None) -> bool:
    """Return whether the other processes know of the error that ends this one."""
    return error is None or error is _settled


def exit_code(error: BaseException) -> int:
    """Return the exit code that the programs have for an error: 2 for invalid input, 1 for others."""
    if isinstance(code := getattr(error, "code", None), int):
        return code
    if isinstance(error, KeyboardInterrupt):
        return 130
    kinds = (ValueError, NotImplementedError, FileNotFoundError, NotADirectoryError, IsADirectoryError)
    return 2 if isinstance(error, (*kinds, FileExistsError, PermissionError)) else 1


def message_of(error: BaseException) -> str:
    """Return the message of an error in one line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    if isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {text}"
    return " ".join(text.split())[:500] or type(error).__name__
