"""PTX, as NVRTC makes it of this project's kernels, to C++ that `runtime.h` runs.

Registers keep PTX's names and widths; the type of an operation comes from the instruction, and `as<T>` in the runtime
reads a register as that type. An instruction, directive or operand that is not known here is an error, so that a new
compiler cannot slip past the checks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

ARRAY_GAP = 64
"""Bytes between two shared arrays, so that a step past one is outside both."""

# Instruction -> C++; A, B and C are the operands behind the target, {0}, {1} what the pattern's groups caught.
EXPRESSIONS = (
    (r"add\.(?:rn\.)?(\w+)", "as<{0}>(A) + as<{0}>(B)"),
    (r"sub\.(?:rn\.)?(\w+)", "as<{0}>(A) - as<{0}>(B)"),
    (r"mul\.(?:lo\.|rn\.)?(\w+)", "as<{0}>(A) * as<{0}>(B)"),
    (r"mul\.wide\.(\w+)", "wide(as<{0}>(A), as<{0}>(B))"),
    (r"mul\.hi\.(\w+)", "high(as<{0}>(A), as<{0}>(B))"),
    (r"mad\.lo\.(\w+)", "as<{0}>(A) * as<{0}>(B) + as<{0}>(C)"),
    (r"mad\.wide\.([su])32", "wide(as<{0}32>(A), as<{0}32>(B)) + as<{0}64>(C)"),
    (r"fma\.rn\.f32", "fmaf(as<f32>(A), as<f32>(B), as<f32>(C))"),
    (r"fma\.rm\.f32", "fma_down(as<f32>(A), as<f32>(B), as<f32>(C))"),
    (r"div\.rn\.f32", "as<f32>(A) / as<f32>(B)"),
    (r"div\.([su]\d+)", "quotient(as<{0}>(A), as<{0}>(B), PC)"),
    (r"rem\.([su]\d+)", "remainder_of(as<{0}>(A), as<{0}>(B), PC)"),
    (r"rcp\.rn\.f32", "1.0f / as<f32>(A)"),
    (r"sqrt\.rn\.f32", "sqrtf(as<f32>(A))"),
    (r"ex2\.approx\.ftz\.f32", "exp2_flushed(as<f32>(A))"),
    (r"(min|max)\.f32", "f{0}f(as<f32>(A), as<f32>(B))"),
    (r"(min|max)\.([su]\d+)", "std::{0}(as<{1}>(A), as<{1}>(B))"),
    (r"abs\.f32", "fabsf(as<f32>(A))"),
    (r"abs\.(s\d+)", "(as<{0}>(A) < 0 ? -as<{0}>(A) : as<{0}>(A))"),
    (r"neg\.(\w+)", "-as<{0}>(A)"),
    (r"not\.pred", "!as<pred>(A)"),
    (r"not\.(b\d+)", "~as<{0}>(A)"),
    (r"and\.(\w+)", "as<{0}>(A) & as<{0}>(B)"),
    (r"or\.(\w+)", "as<{0}>(A) | as<{0}>(B)"),
    (r"xor\.(\w+)", "as<{0}>(A) ^ as<{0}>(B)"),
    (r"shl\.(\w+)", "shift_left(as<{0}>(A), as<u32>(B))"),
    (r"shr\.(\w+)", "shift_right(as<{0}>(A), as<u32>(B))"),
    (r"bfi\.b32", "insert_bits(as<u32>(A), as<u32>(B), as<u32>(C), as<u32>(D))"),
    (r"selp\.(\w+)", "as<pred>(C) ? as<{0}>(A) : as<{0}>(B)"),
    (r"setp\.nan\.f32", "as<f32>(A) != as<f32>(A) || as<f32>(B) != as<f32>(B)"),
    (r"setp\.num\.f32", "as<f32>(A) == as<f32>(A) && as<f32>(B) == as<f32>(B)"),
    (r"setp\.ne\.f32", "as<f32>(A) < as<f32>(B) || as<f32>(A) > as<f32>(B)"),
    # Unordered comparisons hold for NaN too: the opposite of the opposite.
    (r"setp\.eq(u)\.f32", "!(as<f32>(A) < as<f32>(B) || as<f32>(A) > as<f32>(B))"),
    (r"setp\.neu\.f32", "as<f32>(A) != as<f32>(B)"),
    (r"setp\.gtu\.f32", "!(as<f32>(A) <= as<f32>(B))"),
    (r"setp\.geu\.f32", "!(as<f32>(A) < as<f32>(B))"),
    (r"setp\.ltu\.f32", "!(as<f32>(A) >= as<f32>(B))"),
    (r"setp\.leu\.f32", "!(as<f32>(A) > as<f32>(B))"),
    (r"setp\.eq\.(\w+)", "as<{0}>(A) == as<{0}>(B)"),
    (r"setp\.ne\.(\w+)", "as<{0}>(A) != as<{0}>(B)"),
    (r"setp\.(?:lt|lo)\.(\w+)", "as<{0}>(A) < as<{0}>(B)"),
    (r"setp\.(?:le|ls)\.(\w+)", "as<{0}>(A) <= as<{0}>(B)"),
    (r"setp\.(?:gt|hi)\.(\w+)", "as<{0}>(A) > as<{0}>(B)"),
    (r"setp\.(?:ge|hs)\.(\w+)", "as<{0}>(A) >= as<{0}>(B)"),
    (r"cvt\.f32\.f16", "from_half(as<u16>(A))"),
    (r"cvt\.rn\.f16\.f32", "to_half(as<f32>(A))"),
    (r"cvt\.rn\.bf16\.f32", "to_bfloat16(as<f32>(A))"),
    (r"cvt\.rmi\.f32\.f32", "floorf(as<f32>(A))"),
    (r"cvt\.sat\.f32\.f32", "saturate(as<f32>(A))"),
    (r"cvt\.rzi\.s32\.f32", "truncated(as<f32>(A))"),
    (r"cvt\.rn\.f32\.([su]\d+)", "(f32)as<{0}>(A)"),
    (r"cvt\.([su]\d+)\.([su]\d+)", "as<{0}>(as<{1}>(A))"),
    (r"mov\.(\w+)", "as<{0}>(A)"),
    (r"cvta(?:\.to)?\.\w+\.u64", "as<u64>(A)"),
)
BYTES = {"8": 1, "16": 2, "32": 4, "64": 8}
SPECIAL = {f"%{name}.{axis}": f"{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"}


class UnknownPtx(ValueError):
    """PTX that this translator has no rule for."""


@dataclass
class Entry:
    """One kernel: its text, and what it has in shared and local memory."""

    name: str
    argument_bytes: int
    statements: list[str]
    symbols: dict[str, int] = field(default_factory=dict)
    arrays: list[tuple[str, int, int]] = field(default_factory=list)
    shared_bytes: int = 16
    local_bytes: int = 0

    def add_array(self, name: str, size: int) -> None:
        """Give a shared array its place; size 0 is what comes with the launch, and must be the last."""
        self.symbols[name] = self.shared_bytes
        self.arrays.append((name, self.shared_bytes, size))
        self.shared_bytes = -(-(self.shared_bytes + size + ARRAY_GAP) // 16) * 16


def split_operands(text: str) -> list[str]:
    """Operands, with `{a, b}` and `[a+4]` each in one piece."""
    return [part.strip() for part in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", text)]


def entries(ptx: str) -> Iterator[Entry]:
    """The kernels of a module, each with its statements; dynamic shared memory is the module's."""
    text = re.sub(r"//.*", "", ptx)
    dynamic = re.findall(r"\.extern \.shared \.align \d+ \.b8 (\w+)\[\]", text)
    pattern = r"\.entry (\w+)\(\s*\.param \.align \d+ \.b8 (\w+)\[(\d+)\]\s*\)[^{]*\{(.*?)^\}"
    for name, argument, size, body in re.findall(pattern, text, re.S | re.M):
        # A colon ends a label, a semicolon all else; braces that only bound a scope say nothing more.
        pieces = (piece.strip() for piece in re.split(r";|(?<=:)\s", re.sub(r"^\s*[{}]\s*$", "", body, flags=re.M)))
        entry = Entry(name, int(size), [piece for piece in pieces if piece])
        entry.symbols[argument] = 0
        declare(entry)
        for array in dynamic:
            if any(re.search(rf"\b{array}\b", statement) for statement in entry.statements):
                entry.add_array(array, 0)
        yield entry


def declare(entry: Entry) -> None:
    """Take the declarations of arrays out of the statements."""
    rest = []
    for statement in entry.statements:
        found = re.fullmatch(r"\.(shared|local) \.align \d+ \.b8\s+(\w+)\[(\d+)\]", statement)
        if found is None:
            rest.append(statement)
        elif found[1] == "shared":
            entry.add_array(found[2], int(found[3]))
        else:
            entry.symbols[found[2]] = entry.local_bytes
            entry.local_bytes += int(found[3])
    entry.statements = rest


class Translator:
    """Translates modules; the texts of instructions are kept for reports."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def module(self, ptx: str) -> str:
        """A C++ source of all kernels of a PTX module.

        Raises:
            UnknownPtx: there is something that has no rule.
        """
        kernels = list(entries(ptx))
        if len(kernels) != ptx.count(".entry "):
            raise UnknownPtx("a kernel that takes other than one structure")
        functions = [self.function(kernel) for kernel in kernels]
        texts = ",\n".join('"' + text.replace("\\", "").replace('"', "'") + '"' for text in self.texts)
        table = ",\n".join(
            f'{{"{k.name}", run_{k.name}, arrays_{k.name}, {len(k.arrays)}, {k.shared_bytes}, {k.local_bytes}, '
            f"{k.argument_bytes}}}"
            for k in kernels
        )
        return (
            f'#include "runtime.h"\n{"".join(functions)}\nstatic const char* const texts[] = {{{texts}}};\n'
            f"const Kernel kernels[] = {{{table}}};\nconst int kernel_count = {len(kernels)};\n"
            "static const bool texts_are_set = (instruction_text = texts, true);\n"
        )

    def function(self, entry: Entry) -> str:
        """One kernel as a function, and its shared arrays."""
        registers, lines = [], []
        for statement in entry.statements:
            if statement.startswith(".reg"):
                registers.append(declaration(statement))
            elif not re.match(r"\.(loc|pragma)\b", statement):
                lines.append(self.statement(entry, statement))
        arrays = ", ".join(f'{{"{name}", {at}, {size}}}' for name, at, size in entry.arrays) or '{"", 0, 0}'
        return (
            f"static const Array arrays_{entry.name}[] = {{{arrays}}};\nstatic void run_{entry.name}() {{\n"
            + "\n".join(registers + with_tallies(lines))
            + "\nreturn;\n}\n"
        )

    def statement(self, entry: Entry, text: str) -> str:
        """A label, or an instruction with the predicate that it depends on."""
        if text.endswith(":"):
            return f"{label(text[:-1])}:;"
        found = re.fullmatch(r"(?:@(!?)%(\w+)\s+)?([\w.:]+)\s*(.*)", text, re.S)
        if found is None or text.startswith("."):
            raise UnknownPtx(f"{entry.name}: {text}")
        refused, predicate, operation, operands = found.groups()
        pc = len(self.texts)
        self.texts.append(" ".join(f"{operation} {operands}".split()))
        code = Instruction(entry.symbols, pc, operation, split_operands(operands)).code()
        return f"if ({refused}{register(predicate)}) {{ {code} }}" if predicate else code


def with_tallies(lines: list[str]) -> list[str]:
    """Add to each run of instructions that is entered at its top alone the count of its instructions."""
    out: list[str] = []
    run: list[str] = []
    for line in [*lines, "end:;"]:
        if not line.endswith(":;"):
            run.append(line)
        if line.endswith(":;") or "goto " in line:
            out += [f"executed += {len(run)};", *run] if run else []
            run = []
        if line.endswith(":;") and line != "end:;":
            out.append(line)
    return out


def declaration(statement: str) -> str:
    """Registers as variables; they start as zero, where PTX leaves them undefined."""
    found = re.fullmatch(r"\.reg \.(\w+)\s+%(\w+)(?:<(\d+)>)?", statement)
    if found is None:
        raise UnknownPtx(statement)
    kind, name, count = found.groups()
    names = [f"{name}{number}" for number in range(int(count))] if count else [name]
    return f"{kind} " + ", ".join(f"{register(each)} = 0" for each in names) + ";"


def register(name: str) -> str:
    """The variable of a register: `%f32` must not hide the type."""
    return f"r_{name}"


def label(name: str) -> str:
    """A C++ label."""
    return name.replace("$", "L")


@dataclass
class Instruction:
    """One instruction on its way to C++."""

    symbols: dict[str, int]
    pc: int
    operation: str
    operands: list[str]

    def code(self) -> str:
        """The C++ statement."""
        name = self.operation.partition(".")[0]
        special = {"ld": self.memory, "st": self.memory, "bra": self.jump, "ret": self.end, "bar": self.wait}
        if name in special:
            return special[name]()
        if name == "shfl":
            return self.exchange()
        if name == "mov" and any(operand.startswith("{") for operand in self.operands):
            return self.halves()
        return self.expression()

    def value(self, operand: str) -> str:
        """An operand as a C++ expression."""
        if operand in SPECIAL:
            return SPECIAL[operand]
        if operand.startswith("!"):
            return f"!{self.value(operand[1:])}"
        if operand.startswith("%"):
            return register(operand[1:])
        if operand.startswith("0f"):
            return f"as<f32>(0x{operand[2:]}u)"
        if re.fullmatch(r"-?\d+|0x[0-9a-fA-F]+U?", operand):
            return f"(s64){operand.rstrip('U')}ll"
        if operand in self.symbols:
            return f"(u64){self.symbols[operand]}"
        raise UnknownPtx(f"operand {operand} of {self.operation}")

    def expression(self) -> str:
        for pattern, template in EXPRESSIONS:
            found = re.fullmatch(pattern, self.operation)
            if found:
                return f"set({self.value(self.operands[0])}, {self.filled(template.format(*found.groups()))});"
        raise UnknownPtx(f"{self.operation} {', '.join(self.operands)}")

    def filled(self, template: str) -> str:
        """The template with the operands in it."""
        names = dict(zip("ABCD", map(self.value, self.operands[1:]), strict=False)) | {"PC": str(self.pc)}
        return re.sub(r"\b(A|B|C|D|PC)\b", lambda name: names[name[0]], template)

    def address(self, operand: str) -> str:
        found = re.fullmatch(r"\[([%\w$.]+)(?:\+(-?\d+))?\]", operand)
        if found is None:
            raise UnknownPtx(f"address {operand}")
        return f"as<u64>({self.value(found[1])}) + (s64){found[2] or 0}"

    def memory(self) -> str:
        found = re.fullmatch(
            r"(ld|st)\.(global|shared|local|param)(?:\.nc)?(?:\.v([24]))?\.([a-z])(\d+)", self.operation
        )
        if found is None:
            raise UnknownPtx(self.operation)
        way, space, lanes, kind, bits = found.groups()
        write = way == "st"
        place, given = self.operands if write else self.operands[::-1]
        registers = split_operands(given.strip("{}"))
        size = BYTES[bits] * int(lanes or 1)
        moves = [self.move(way, f"{kind}{bits}", number, each) for number, each in enumerate(registers) if each != "_"]
        where = f"in_{space}({self.address(place)}, {size}, {str(write).lower()}, {self.pc})"
        return f"{{ char* const at = {where}; {' '.join(moves)} }}"

    def move(self, way: str, kind: str, number: int, register: str) -> str:
        value = self.value(register)
        if way == "ld":
            return f"set({value}, peek<{kind}>(at, {number}));"
        return f"poke<{kind}>(at, {number}, as<{kind}>({value}));"

    def halves(self) -> str:
        """`mov` between a register and the two halves of it."""
        to, source = self.operands
        whole = self.operation.partition(".")[2]
        width = BYTES[whole[1:]] * 4
        if source.startswith("{"):
            low, high = (f"(u64)as<u{width}>({self.value(each)})" for each in split_operands(source.strip("{}")))
            return f"set({self.value(to)}, as<{whole}>({high} << {width} | {low}));"
        parts = [
            f"set({self.value(each)}, as<u{width}>(word >> {number * width}));"
            for number, each in enumerate(split_operands(to.strip("{}")))
            if each != "_"
        ]
        return f"{{ const {whole} word = as<{whole}>({self.value(source)}); {' '.join(parts)} }}"

    def exchange(self) -> str:
        if self.operation != "shfl.sync.bfly.b32":
            raise UnknownPtx(self.operation)
        target, _, valid = self.operands[0].partition("|")
        given = ", ".join(f"as<u32>({self.value(each)})" for each in self.operands[1:])
        every = f" {self.value(valid)} = true;" if valid else ""
        return f"set({self.value(target)}, shuffle({given}, {self.pc}));{every}"

    def jump(self) -> str:
        return f"goto {label(self.operands[0])};"

    def end(self) -> str:
        return "return;"

    def wait(self) -> str:
        if (self.operation, self.operands) != ("bar.sync", ["0"]):
            raise UnknownPtx(f"{self.operation} {self.operands}")
        return f"barrier({self.pc});"
