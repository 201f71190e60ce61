"""A kernel's PTX, as NVRTC emits it, taken apart: instructions, labels, parameters, static shared memory."""

from __future__ import annotations

import re
from dataclasses import dataclass

VECTOR = re.compile(r"\{([^{};]*)\}")  # braces also enclose the scopes of inline assembly, which hold a semicolon
OPERAND = re.compile(r"<[^>]*>|\[[^\]]*\]|[^,\s][^,]*")
INSTRUCTION = re.compile(r"(?:@(!?)(%\w+)\s+)?([\w.:]+)\s*(.*)", re.S)
DYNAMIC_SHARED = re.compile(r"\.extern\s+\.shared\s+\.align\s+\d+\s+\.b8\s+([\w$]+)\[\]")
SHARED = re.compile(r"\.shared\s+\.align\s+(\d+)\s+\.[bus](\d+)\s+([\w$]+)(?:\[(\d+)\])?;")


@dataclass(frozen=True)
class Instruction:
    name: str  # "ld"
    modifiers: tuple[str, ...]  # ("global", "nc", "f32")
    operands: tuple[str, ...]  # ("%f1", "[%rd4+8]"); vectors as "<%f1, %f2>"
    predicate: str | None
    negated: bool

    @property
    def kind(self) -> str:
        """The type it works in: its last modifier."""
        return self.modifiers[-1]

    @property
    def collective(self) -> bool:
        """Whether it takes all threads of a warp or of the block."""
        return "sync" in self.modifiers or self.of_the_block

    @property
    def of_the_block(self) -> bool:
        return self.name in ("bar", "barrier") and "warp" not in self.modifiers

    def __str__(self) -> str:
        return f"{'.'.join((self.name, *self.modifiers))} {', '.join(self.operands)}"


@dataclass(frozen=True)
class Program:
    parameters: tuple[str, ...]
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    shared: dict[str, int]  # offsets of the static variables
    shared_bytes: int


def parse(ptx: str, entry: str) -> Program:
    """The program of one kernel of a PTX text, by its mangled name."""
    text = re.sub(r"//[^\n]*", "", ptx)
    start = re.search(rf"\.entry\s+{re.escape(entry)}\s*\(", text)
    if start is None:
        raise KeyError(entry)
    head, body = text[start.end() :].split("{", 1)
    body = re.split(r"\n\}", body, maxsplit=1)[0]
    shared, size = _shared(text[: text.index(".entry")] + body)
    instructions, labels = _instructions(body)
    return Program(tuple(re.findall(r"\.param\s+[^,)]*?(\w+)\s*[,)\n]", head)), instructions, labels, shared, size)


def _shared(text: str) -> tuple[dict[str, int], int]:
    offsets, end = {}, 0
    for alignment, bits, name, count in SHARED.findall(text):
        offsets[name] = -(-end // int(alignment)) * int(alignment)
        end = offsets[name] + int(bits) // 8 * int(count or 1)
    offsets |= dict.fromkeys(DYNAMIC_SHARED.findall(text), -(-end // 16) * 16)  # after all the others
    return offsets, end


def _own_names(scope: re.Match[str]) -> str:
    """A block within the program, whose registers may be called as others outside: they get names of their own."""
    text, number = scope[1], scope.start()
    for register in re.findall(r"\.reg\s+\.\w+\s+(%\w+)\s*;", text):
        text = re.sub(rf"{register}\b", f"{register}_{number}", text)
    return f";{text};"


def _instructions(body: str) -> tuple[tuple[Instruction, ...], dict[str, int]]:
    instructions: list[Instruction] = []
    labels = {}
    for statement in re.sub(r"\{([^{}]*)\}", _own_names, VECTOR.sub(r"<\1>", body)).split(";"):
        rest = statement.strip()
        while label := re.match(r"([$\w]+):\s*", rest):
            labels[label[1]] = len(instructions)
            rest = rest[label.end() :]
        if rest and not rest.startswith("."):  # what starts with a dot declares
            instructions.append(_instruction(rest))
    return tuple(instructions), labels


def _instruction(text: str) -> Instruction:
    found = INSTRUCTION.match(text)
    assert found, text
    name, *modifiers = found[3].split(".")
    operands = tuple(operand.strip() for operand in OPERAND.findall(found[4]))
    return Instruction(name, tuple(modifiers), operands, found[2], found[1] == "!")
