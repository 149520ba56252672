"""The commands, snippets and messages of README and Resources/Docs, read out of the pages."""

from __future__ import annotations

import ast
import functools
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "Resources/Docs").glob("*.md"))]
_FENCE = re.compile(r"^( *)```(\w+)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_ANY = "(?:.*)"
_FEW = 8  # letters that a message must have of its own to be told from others
_SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")


@dataclass(frozen=True)
class Block:
    """A fenced block: its page, its language, its text, and the page's last line before it."""

    page: Path
    language: str
    text: str
    before: str

    @property
    def name(self) -> str:
        """For the ids of tests."""
        return f"{self.page.name}: {self.text.strip().splitlines()[0][:60]}"


def blocks(language: str) -> list[Block]:
    """All blocks of a language, page by page, in order."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for hit in _FENCE.finditer(text):
            if hit[2] == language:
                before = text[: hit.start()].rstrip().rpartition("\n\n")[2]
                found.append(Block(page, language, hit[3], before))
    return found


def commands(page: Path | None = None) -> Iterator[tuple[Block, str]]:
    """Every line of shell, without its comment; continued lines are one."""
    for block in blocks("sh"):
        if page in (None, block.page):
            for line in block.text.replace("\\\n", " ").splitlines():
                plain = re.sub(r"\s+#.*$", "", line).strip()
                if plain and not plain.startswith("#"):
                    yield block, plain


def spans(page: Path) -> list[str]:
    """Code inside running text, line breaks as spaces."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    return [" ".join(span.split()) for span in _SPAN.findall(text)]


def words_of(command: str) -> list[str]:
    """A command's words, as a shell splits them."""
    return shlex.split(command)


@functools.cache
def messages() -> list[tuple[re.Pattern[str], re.Pattern[str]]]:
    """Patterns of message and hint of every error in the code."""
    found = []
    for folder in ("CTSegLogic", "CTSegExtension"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            kept = _kept(tree)
            for node in ast.walk(tree):
                if isinstance(node, ast.Call):
                    given = {
                        k.arg: _pattern(k.value, kept) for k in node.keywords if k.arg in ("seen", "hint")
                    }
                    plain = re.sub(r"\W", "", given.get("seen", "").replace(_ANY, ""))
                    if len(given) == 2 and len(plain) > _FEW:
                        found.append((re.compile(given["seen"]), re.compile(given["hint"])))
    return found


def _kept(tree: ast.AST) -> dict[str, list[ast.expr]]:
    """What variables called `seen` and `hint` are set to in a file."""
    kept: dict[str, list[ast.expr]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            kept.setdefault(node.targets[0].id, []).append(node.value)
    return {name: values for name, values in kept.items() if name in ("seen", "hint")}


def _pattern(node: ast.expr, kept: Mapping[str, Sequence[ast.expr]]) -> str:
    """A regular expression for what an expression of text can say."""
    match node:
        case ast.Constant():
            return re.escape(str(node.value))
        case ast.JoinedStr():
            return "".join(re.escape(v.value) if isinstance(v, ast.Constant) else _ANY for v in node.values)
        case ast.IfExp():
            return f"(?:{_pattern(node.body, kept)}|{_pattern(node.orelse, kept)})"
        case ast.Call(func=ast.Name(id="_")):
            return _pattern(node.args[0], kept)
        case ast.Call(func=ast.Attribute(attr="strip")):
            return _pattern(node.func.value, kept)
        case ast.Call(func=ast.Attribute(attr="format")):
            return re.sub(r"\\\{\w+\\\}", lambda _: _ANY, _pattern(node.func.value, kept))
        case ast.Name(id=name) if name in kept:
            return "(?:" + "|".join(_pattern(value, {}) for value in kept[name]) + ")"
    return _ANY
