"""The verdict in the terminal: a table of features, then what is wrong, what is refused and what is not judged."""

from collections.abc import Mapping, Sequence

from bench.judge.outcomes import FAILED, NO_GRADIENT, NO_KERNEL, OK, REFUSED, WRONG, Outcome
from bench.judge.verdicts import NOT_JUDGED, Features, Verdict
from dantinox.system.console import Console

Table = Mapping[str, Mapping[Features, Verdict]]  # form -> feature -> verdict
STYLES = {OK: "green", WRONG: "bold red", FAILED: "bold red", REFUSED: "yellow", NOT_JUDGED: "bold magenta"}
SHOUTED = {WRONG: "WRONG", FAILED: "FAILED", NOT_JUDGED: "NOT JUDGED"}
ASCII = str.maketrans("█▞░", "#/.")  # the marks of a picture, for consoles of another encoding
MAX_SHOWN = 6  # failures of a form that are shown in full


def show(table: Table, console: Console) -> None:
    """Print the table of features: one column a form."""
    features = list(dict.fromkeys(feature for column in table.values() for feature in column))
    cells = {form: [_cell(table[form].get(feature)) for feature in features] for form in table}
    names = [" + ".join(sorted(feature)) for feature in features]
    first = max(len(name) for name in ("feature", *names)) + 2
    widths = {form: max(len(_plain(cell)) for cell in (*cells[form], [(form, "")])) + 3 for form in table}
    header = "feature".ljust(first) + "".join(form.ljust(widths[form]) for form in table)
    console.print(f"[dim]{header.rstrip()}[/]", highlight=False, soft_wrap=True)
    for number, name in enumerate(names):
        line = name.ljust(first)
        for form in table:
            cell = cells[form][number]
            line += ", ".join(f"[{style}]{text}[/]" if style else text for text, style in cell)
            line += " " * (widths[form] - len(_plain(cell)))
        console.print(line.rstrip(), highlight=False, soft_wrap=True)


Cell = list[tuple[str, str]]  # texts with their styles


def _plain(cell: Cell) -> str:
    return ", ".join(text for text, _ in cell)


def _cell(verdict: Verdict | None) -> Cell:
    """One word if all results share a state, else each state with its results, the wrong ones first."""
    if verdict is None or not verdict.states:
        return [("", "")]
    by_state: dict[str, list[str]] = {}
    for name, state in verdict.states.items():
        by_state.setdefault(state, []).append(name)
    order = (WRONG, FAILED, NOT_JUDGED, REFUSED, NO_GRADIENT, NO_KERNEL, OK)
    return [
        (" ".join([SHOUTED.get(state, state), *(by_state[state] if len(by_state) > 1 else [])]), STYLES.get(state, ""))
        for state in order
        if state in by_state
    ]


def show_failures(table: Table, console: Console) -> None:
    """Print where the wrong features are wrong, each in its simplest case; forms that fail alike share a paragraph."""
    paragraphs: dict[str, tuple[list[str], list[str]]] = {}  # text -> (forms, features)
    for form, column in table.items():
        for feature, verdict in column.items():
            if verdict.is_wrong and verdict.case is not None:
                forms, features = paragraphs.setdefault(_failure(verdict.case), ([], []))
                forms += [form] if form not in forms else []
                name = " + ".join(sorted(feature))
                features += [name] if name not in features else []
    for number, (text, (forms, features)) in enumerate(paragraphs.items()):
        if number == MAX_SHOWN:
            _line(console, f"\n... and {len(paragraphs) - number} more cases; --case shows one")
            break
        _line(console, f"\n{', '.join(forms)}: {', '.join(features)}: WRONG", "bold red")
        _line(console, text)


def _failure(outcome: Outcome) -> str:
    """Say where a case is wrong: a line for each result, and the tiles."""
    lines = [f"  --case {outcome.case.id!r}  ({outcome.case.workload.label()})"]
    lines += [f"  {name}: {line}" if name else f"  {line}" for name, line in outcome.lines.items()]
    return "\n".join([*lines, outcome.picture] if outcome.picture else lines)


def show_reasons(outcomes: Sequence[Outcome], console: Console) -> None:
    """Print why cases were refused or had no gradient: each reason once, with the forms and the number of cases."""
    reasons: dict[tuple[str, str], dict[str, set[str]]] = {}
    for outcome in outcomes:
        state = next((s for s in (REFUSED, NO_GRADIENT) if s in outcome.states.values()), None)
        if state and "" in outcome.lines:
            forms = reasons.setdefault((state, outcome.lines[""]), {})
            forms.setdefault(outcome.form, set()).add(outcome.case.id)
    for (state, reason), forms in reasons.items():
        number = max(len(cases) for cases in forms.values())
        _line(console, f"{', '.join(forms)}: {state} in {number} case{'s'[: number != 1]}: {reason}", "yellow")


def not_judged(table: Table) -> list[str]:
    """Return a line for each form: the results of features that no case judged."""
    lines = []
    for form, column in table.items():
        missing: dict[str, list[str]] = {}
        for feature, verdict in column.items():
            states = verdict.states or {"everything": NOT_JUDGED}
            names = [name for name, state in states.items() if state in (NOT_JUDGED, NO_GRADIENT)]
            if names:
                what = "" if len(names) == len(states) else f" ({', '.join(names)})"
                missing.setdefault(what, []).append(" + ".join(sorted(feature)))
        for what, features in missing.items():
            lines.append(f"{form}: {', '.join(features)}{what}")
    return lines


def show_not_judged(table: Table, reasons: Mapping[str, str], console: Console) -> None:
    """Print what is not judged: whole forms with the reason, then features.

    Args:
        table: the verdicts of the forms that were judged.
        reasons: why each other form was not.
        console: where to print.
    """
    lines = [f"{form}: {reason}" for form, reason in reasons.items()] + not_judged(table)
    if lines:
        _line(console, "")
        _line(console, "NOT JUDGED", "bold magenta")
        for line in lines:
            _line(console, f"  {line}")


def summary(table: Table, outcomes: Sequence[Outcome]) -> str:
    """Say in one line how many cases each form passed and failed."""
    parts = []
    for form in table:
        counts = dict.fromkeys((OK, WRONG, FAILED, REFUSED), 0)
        for outcome in outcomes:
            if outcome.form == form:
                states = outcome.states.values()
                state = next((s for s in (FAILED, WRONG, REFUSED) if s in states), OK)
                counts[state] += 1
        parts.append(f"{form} " + ", ".join(f"{n} {state}" for state, n in counts.items() if n))
    return "; ".join(parts)


def _line(console: Console, text: str, style: str = "") -> None:
    if not console.encoding.startswith("utf"):
        text = text.translate(ASCII)
    console.print(text, style=style or None, markup=False, highlight=False, soft_wrap=True)
