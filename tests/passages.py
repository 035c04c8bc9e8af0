"""Draws 60 passages of the project's prose by a seed, to be judged by a reader who does not know the code.

    python tests/passages.py                 the draw of the committed seed
    python tests/passages.py --seed 2        another draw

A passage is a paragraph of a docstring, a comment, a message, or a paragraph, list item or table row of a README.
Messages, and comments at the end of a line of code, are shown with that line. At most 3 of 60 should need a second
reading.
"""

import argparse
import ast
import io
import random
import re
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SEED, COUNT = 11, 60
ROOMS = ("README.md", "train.py", "jasper_fast", "kernels", "csrc", "bench", "tests")
SUFFIXES = (".py", ".md", ".cpp", ".h", ".cu", ".cuh")
# Four words in a row. Most formulas do not match; signatures with several arguments do.
PROSE = re.compile(r"(?:[A-Za-z`][\w`',.:;()-]* +){3}[A-Za-z`]")


def files() -> list[Path]:
    """Returns all files that contain prose, sorted by path."""
    paths = (path for name in ROOMS for path in (ROOT / name, *(ROOT / name).rglob("*")))
    return sorted(path for path in paths if path.is_file() and path.suffix in SUFFIXES)


def passages(path: Path) -> list[tuple[int, str]]:
    """Returns (line, text) of each passage in a file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        found = python(text, messages="tests" not in path.parts)
    elif path.suffix == ".md":
        found = paragraphs(text, 1, r"\n(?=\||- |\d\. )")
    else:
        comments = re.finditer(r"(?m)(?:^[ \t]*//[^\n]*\n?)+|//[^\n]*", text)
        found = [(text.count("\n", 0, m.start()) + 1, m[0]) for m in comments]
    prose = ((line, " ".join(re.sub(r"(?m)^\s*(?:#|//)", "", said).split())) for line, said in found)
    return [(line, said) for line, said in prose if PROSE.search(said)]


def python(text: str, messages: bool) -> list[tuple[int, str]]:
    """Returns the comments and docstring paragraphs of a Python file, and its strings if `messages` is set."""
    found: list[tuple[int, str]] = []
    last = 0  # line of the previous comment, if that line has no code
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            alone = not token.line[: token.start[1]].strip()
            if alone and last == token.start[0] - 1 and "----" not in found[-1][1]:
                found[-1] = (found[-1][0], f"{found[-1][1]}\n{token.string}")
            else:
                found.append((token.start[0], token.string))
            last = token.start[0] if alone else 0
    inside = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            if docstring := ast.get_docstring(node):
                found += paragraphs(docstring, node.body[0].lineno)
                inside.add(id(node.body[0].value))
        elif id(node) in inside or not messages:
            continue
        elif isinstance(node, ast.JoinedStr):
            inside.update(id(part) for part in ast.walk(node))
            said = "".join(part.value if isinstance(part, ast.Constant) else "{...}" for part in node.values)
            found.append((node.lineno, said))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found += paragraphs(node.value, node.lineno)
    return found


def paragraphs(text: str, line: int, more: str = r"(?!)") -> list[tuple[int, str]]:
    """Returns (line, text) of each paragraph. A match of the pattern `more` also begins a paragraph."""
    found = []
    for part in re.split(rf"(\n\s*\n|{more})", text):
        if part.strip():
            found.append((line, part))
        line += part.count("\n")
    return found


def main() -> None:
    """Prints the draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=SEED, help=f"default: {SEED}")
    parser.add_argument("--count", type=int, default=COUNT, help=f"number of passages (default: {COUNT})")
    args = parser.parse_args()
    known = [(path, *found) for path in files() for found in passages(path)]
    for number, (path, line, said) in enumerate(random.Random(args.seed).sample(known, args.count), 1):
        code = path.read_text(encoding="utf-8").splitlines()[line - 1].strip()
        shown = f"\n    in: {code}" if path.suffix != ".md" and not code.startswith(('"""', "#", "//")) else ""
        print(f"{number:2}. {path.relative_to(ROOT)}:{line}\n    {said}{shown}\n")


if __name__ == "__main__":
    main()
