"""Parse the PTX of a kernel: instructions, the registers that they read and write, labels and successors."""

import functools
import re
from dataclasses import dataclass

_ENTRY = re.compile(r"\.visible \.entry ([\w$]+)\(")
_PARAM = re.compile(r"([\w$]+)(?:\[(\d+)\])?\s*$")
_THREADS = re.compile(r"\.(?:maxntid|reqntid)\s+([\d, ]+)")
_LABEL = re.compile(r"([$A-Za-z_][\w$]*):(?!:)")
_STATEMENT = re.compile(r"(?:@(!?)(%?\w+)\s+)?([a-z][\w.:]*)\s*(.*)$", re.DOTALL)
_LOCAL = re.compile(r"\.reg\s+\.\w+\s+([A-Za-z]\w*)\s*;")
_SPECIAL = r"%(?:tid|ntid|ctaid|nctaid|laneid|warpid|clusterid|cluster_ctaid|clock|smid|globaltimer)\b"
_NO_RESULT = (
    *("st.", "stmatrix", "red.", "bra", "bar.", "barrier.", "ret", "exit", "trap", "fence.", "prefetch", "setmaxnreg"),
    *("mbarrier.init", "mbarrier.inval", "mbarrier.expect_tx", "cp.", "wgmma.fence", "wgmma.commit", "wgmma.wait"),
    *("griddepcontrol", "nanosleep", "membar"),
)


@dataclass(frozen=True, eq=False)
class Instruction:
    """An instruction.

    Attributes:
        line: its line in the text, counted from 1.
        opcode: with all its modifiers.
        operands: as written, destinations first.
        guard: the register of its predicate, or "".
        negated: whether it runs where the predicate is false.
        reads: registers that it reads, its guard and those in addresses included.
        writes: registers that it writes.
    """

    line: int
    opcode: str
    operands: tuple[str, ...]
    guard: str
    negated: bool
    reads: tuple[str, ...]
    writes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Kernel:
    """A kernel.

    Attributes:
        name: of the entry function.
        threads: per block, or 0 where the text does not say.
        params: the parameters in order, and the bytes of one that is passed by value, else 0.
        instructions: in order.
        labels: index of the instruction that follows each label.
    """

    name: str
    threads: int
    params: dict[str, int]
    instructions: list[Instruction]
    labels: dict[str, int]

    @functools.cached_property
    def successors(self) -> list[tuple[int, ...]]:
        """For each instruction, those that may run next.

        Raises:
            ValueError: control flow of another kind than branches.
        """
        result = []
        for i, instruction in enumerate(self.instructions):
            opcode, following = instruction.opcode, [i + 1]
            if opcode.startswith(("brx", "call")):
                raise ValueError(f"{self.name}: line {instruction.line}: {opcode} is not supported")
            if opcode.startswith("bra") and "rier" not in opcode:
                following = [self.labels[instruction.operands[0]], *following[: bool(instruction.guard)]]
            elif opcode in ("ret", "exit", "trap"):
                following = following[: bool(instruction.guard)]
            result.append(tuple(n for n in following if n < len(self.instructions)))
        return result


def parse(text: str) -> list[Kernel]:
    """Parse the kernels of a PTX module."""
    entries = list(_ENTRY.finditer(text))
    ends = [entry.start() for entry in entries[1:]] + [len(text)]
    return [_parse_kernel(text, entry, end) for entry, end in zip(entries, ends)]


def _parse_kernel(text: str, entry: re.Match[str], end: int) -> Kernel:
    start = text.index("\n{", entry.end())
    head, _, directives = text[entry.end() : start].partition(")")
    params = [match for part in head.split(",") if (match := _PARAM.search(part.strip()))]
    directive = _THREADS.search(directives)
    threads = functools.reduce(lambda n, size: n * int(size), directive[1].split(","), 1) if directive else 0
    kernel = Kernel(entry[1], threads, {match[1]: int(match[2] or 0) for match in params}, [], {})
    body = text[start + 2 : end].split("\n}", 1)[0]
    local = "|".join(sorted(set(_LOCAL.findall(body)))) or r"\Z."
    register = re.compile(rf"(?!{_SPECIAL})%\w+|(?<![\w%.$])(?:{local})(?![\w$])")
    scopes: list[int] = []  # inline assembly declares its labels in a scope of its own
    scope_count, rest = 0, ""
    for number, line in enumerate(body.split("\n"), text.count("\n", 0, start + 2) + 1):
        rest += line.split("//", 1)[0].strip()
        while rest:
            rest = rest.lstrip()
            if rest.startswith("{"):
                scope_count += 1
                scopes.append(scope_count)
                rest = rest[1:]
            elif rest.startswith("}"):
                scopes.pop()
                rest = rest[1:]
            elif label := _LABEL.match(rest):
                kernel.labels[_label(label[1], scopes)] = len(kernel.instructions)
                rest = rest[label.end() :]
            elif rest.startswith("."):
                rest = rest.partition(";")[2] if ";" in rest else ""
            elif ";" in rest:
                statement, _, rest = rest.partition(";")
                kernel.instructions.append(_parse_instruction(number, statement, scopes, register))
            else:
                break  # the statement continues on the next line
    return kernel


def _label(name: str, scopes: list[int]) -> str:
    return name if name.startswith("$") or not scopes else f"{name}@{scopes[-1]}"


def _parse_instruction(line: int, statement: str, scopes: list[int], register: re.Pattern[str]) -> Instruction:
    match = _STATEMENT.match(statement.strip())
    if not match:
        raise ValueError(f"line {line}: {statement.strip()!r} is no PTX instruction")
    negated, guard, opcode, rest = match.groups()
    operands = tuple(_split(rest))
    if opcode.startswith("bra"):
        operands = (_label(operands[0], scopes),)
    written = 0 if opcode.startswith(_NO_RESULT) else 1
    writes = [name for operand in operands[:written] for name in register.findall(operand)]
    reads = [name for operand in operands[written:] for name in register.findall(operand)]
    if opcode.startswith("wgmma.mma_async"):
        reads = [*writes, *reads]
    return Instruction(
        line, opcode, operands, guard or "", bool(negated), (*reads, *([guard] * bool(guard))), (*writes,)
    )


def _split(text: str) -> list[str]:
    """Split operands at the commas outside brackets and braces."""
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        if character in "[{":
            depth += 1
        elif character in "]}":
            depth -= 1
        elif character == "," and not depth:
            parts.append(text[start:i].strip())
            start = i + 1
    return [*parts, text[start:].strip()] if text.strip() else []
