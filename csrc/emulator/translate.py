"""Translate the kernels from CUDA C++ to C++ for the emulator: translate.py SOURCE TARGET FILE...

Copies every FILE from below SOURCE to below TARGET with four changes: launches become calls, shared variables
become references to the memory of the CTA, `.cu` becomes `.cu.cpp`, and the functions that instructions.h
defines (those with assembly) are left out.
"""

import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
EMULATED = set(
    re.findall(r"^(?:inline|constexpr) [\w:<>* ]+?(\w+)\(", (HERE / "instructions.h").read_text(), re.M)
)


def without_emulated(text: str) -> str:
    """Drop declarations and definitions of device functions that the emulator has."""
    head = re.compile(r"^(?:template <[^;{}]*?>\n)?__device__ [^;{}()]*?\b(\w+)(?:<[^()]*>)?\(", re.M)
    at, kept = 0, []
    while match := head.search(text, at):
        if match[1] not in EMULATED:
            kept.append(text[at : match.end()])
            at = match.end()
            continue
        kept.append(text[at : match.start()])
        at = end_of_function(text, match.end())
    return "".join(kept) + text[at:]


def end_of_function(text: str, at: int) -> int:
    depth, parentheses = 0, 1
    for i in range(at, len(text)):
        parentheses += {"(": 1, ")": -1}.get(text[i], 0)
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0 and parentheses == 0 and text[i] in ";}":
            return i + 1
    raise ValueError("a function without an end")


def shared_variables(text: str) -> str:
    text = re.sub(
        r"extern __shared__ (?:__align__\(\w+\) )?([\w ]+) (\w+)\[\];",
        r"\1* const \2 = emulator::dynamic_shared<\1>();",
        text,
    )

    def reference(match: re.Match) -> str:
        names = re.findall(r"(\w+)(?:\[[^;]*?\])*(?=,|$)", re.sub(r"\[[^\]]*\]", "", match[1]))
        struct = f"Shared_{names[0]}"
        return (
            f"struct {struct} {{ {match[1]}; }}; "
            f"auto& [{', '.join(names)}] = emulator::static_shared<{struct}>();"
        )

    return re.sub(r"__shared__ ([^;]+);", reference, text)


def launches(text: str) -> str:
    return re.sub(
        r"([\w:]+(?:<[^<>;]*>)?)\s*<<<(.*?)>>>\s*\(",
        r"emulator::launch([=](auto... arguments) { \1(arguments...); }, \2)(",
        text,
        flags=re.S,
    )


def main() -> None:
    source, target, *files = sys.argv[1:]
    for file in files:
        text = (Path(source) / file).read_text()
        text = launches(shared_variables(without_emulated(text)))
        out = Path(target) / (file + ".cpp" if file.endswith(".cu") else file)
        out.parent.mkdir(parents=True, exist_ok=True)
        if not out.exists() or out.read_text() != text:
            out.write_text(text)


if __name__ == "__main__":
    main()
