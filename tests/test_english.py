"""Bans recurring constructions that are hard to read, and summaries longer than one line."""

import ast
import io
import pathlib
import re
import tokenize

import pytest

ROOT = pathlib.Path(__file__).parent.parent
BANNED = {  # a phrase, and what to write instead
    r"(?<!there\s)\b(is|are|was|were) no (?!longer|more|less|better|worse)\w+": '"is not a ..."',
    r"\bnone of\b": '"not ... any of"',
    r"\bwhat (is|are) not\b": "the name of the thing",
    r"\bthat which\b|\bthose which\b": "the name of the thing",
    r"\bnobody\b": '"cannot be ..."',
    r"\bof which there (is|are)\b": "two sentences",
    r"\bwhat of (a|an|the|each|it)\b": '"which part of ..."',
    r"\b(cannot|be|is|are) told\b|\b(cannot|does not|do not) tell\b": '"identified", "determined"',
    r"\bsays? of\b": '"reports", "states"',
    r"\bfor itself\b": '"separately"',
    r"\bas (it is|they are)(?= *[.,;:)]|$)": '"unchanged"',
    r"\banew\b": '"again"',
    r"\bby way of\b": '"through"',
    r"\bhand(s|ed)? (to|on)\b": '"pass"',
    r"\bof (one's|your) own\b": '"custom"',
    r"\bat (its|their) word\b": '"used"',
    r"\bstands? (below|before|among|after|in front|there)\b": '"is", "comes"',
    r"\b(has|have) not the\b": '"lacks"',
    r"\bthat (is|are) (not )?there\b": '"existing", "absent"',
    "\N{EM DASH}": "a comma, a colon or two sentences",
}


def texts(path):
    """Yields the docstrings, comments and strings of a Python file, or a whole Markdown file."""
    source = path.read_text()
    if path.suffix == ".md":
        yield 1, source
        return
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
    comment, start = "", 0  # neighbouring comment lines make one text
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            start = start or token.start[0]
            comment += token.string.removeprefix("#") + "\n"
        elif token.type != tokenize.NL:
            if comment:
                yield start, comment
            comment, start = "", 0


def banned(text):
    """Yields the line, from 0, of each banned phrase, the phrase, and its remedy."""
    text = re.sub(r"[ \t]*\n[ \t]*", "\n", text)
    for phrase, remedy in BANNED.items():
        for match in re.finditer(phrase.replace(" ", r"\s"), text, re.IGNORECASE | re.MULTILINE):
            yield text.count("\n", 0, match.start()), " ".join(match[0].split()), remedy


def pages():
    """The files of the project that hold prose."""
    for folder, kind in (
        ("jaxsparse", "py"),
        ("benchmarks", "py"),
        ("tests", "py"),
        ("docs", "md"),
    ):
        for path in sorted((ROOT / folder).rglob(f"*.{kind}")):
            if "_build" not in path.parts and path != pathlib.Path(__file__):
                yield path
    yield from (ROOT / "README.md", ROOT / "CONTRIBUTING.md")


def test_prose_is_plain():
    problems = [
        f'{path.relative_to(ROOT)}:{line + below}: "{phrase}"; write {remedy}'
        for path in pages()
        for line, text in texts(path)
        for below, phrase, remedy in banned(text)
    ]
    assert not problems, "\n" + "\n".join(problems)


def test_summaries_are_one_sentence_on_one_line():
    problems = []
    for path in (path for path in pages() if path.suffix == ".py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                continue
            lines = (ast.get_docstring(node) or ".").split("\n")
            if not lines[0].endswith(".") or (len(lines) > 1 and lines[1]):
                where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"
                problems.append(f"{where}: {lines[0]!r} is not one line that ends in a full stop")
    assert not problems, "\n" + "\n".join(problems)


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("`plan` is no\n  plan", "is no plan"),
        ("a value is no longer known", None),
        ("there is no such leaf", None),
        ("copied as they are.", "as they are"),
        ("as it is often", None),
    ],
)
def test_a_phrase_is_found(text, phrase):
    assert next((phrase for _, phrase, _ in banned(text)), None) == phrase
