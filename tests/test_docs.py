"""The pages in docs/ that a user follows, followed; and those that are made, made again."""

import doctest
import importlib
import re
import runpy
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from markdown_it import MarkdownIt

CHECKOUT = Path(__file__).parents[1]
DOCS = CHECKOUT / "docs"
FOLLOWED = ("add-data", "add-backbone", "add-strategy")


def blocks(page: Path) -> Iterator[tuple[str, str, str]]:
    """Yield language, text and file name of each fenced block; the name stands alone before it."""
    before = ""
    for token in MarkdownIt().parse(page.read_text()):
        if token.type == "inline":
            alone = len(token.children) == 1 and token.children[0].type == "code_inline"
            before = token.children[0].content if alone else ""
        elif token.type == "fence":
            yield token.info, token.content, before
            before = ""


def commands(text: str) -> Iterator[tuple[str, str]]:
    """Yield each command of a console block, with the output that it is said to have."""
    for part in text.removeprefix("$ ").split("\n$ "):
        command, _, output = part.partition("\n")
        yield command, output.strip("\n")


@pytest.fixture
def call(monkeypatch, tmp_path, capfd) -> Iterator[Callable[[str], str]]:
    """Run a command in an empty folder as `python` would, and return what it prints."""

    def run(command: str) -> str:
        python, *words = shlex.split(command)
        assert python == "python"
        monkeypatch.setattr(sys, "argv", words)
        try:
            if words[0] == "-m":
                monkeypatch.setattr(sys, "argv", words[1:])
                name = "gatl.__main__" if words[1] == "gatl" else words[1]
                importlib.import_module(name).main()
            else:
                runpy.run_path(words[0], run_name="__main__")
        except SystemExit:
            pass  # what it said is in what it printed
        printed = capfd.readouterr()
        return (printed.out + printed.err).strip("\n")

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    threads = torch.get_num_threads()
    yield run
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", FOLLOWED)
def test_a_page_does_what_it_says(tmp_path, call, name):
    ran = 0
    for language, text, file in blocks(DOCS / f"{name}.md"):
        assert (language in ("python", "yaml")) == bool(file), (language, file)
        if file:
            path = tmp_path / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        elif language == "console":
            for command, said in commands(text):
                printed = call(command)
                same = doctest.OutputChecker().check_output(said, printed, doctest.ELLIPSIS)
                assert same, f"{command}\n{printed}"
                ran += 1
    assert ran >= 2


def test_the_reference_is_made_of_conf():
    made = runpy.run_path(str(DOCS / "configuration.py"))
    assert made["page"](made["CONF"]) == made["PAGE"].read_text(), "make docs"


def test_the_drawing_is_made_by_its_script():
    made = runpy.run_path(str(DOCS / "chromosome.py"))
    assert made["picture"]() == made["PICTURE"].read_text(), "make docs"


@pytest.mark.parametrize(
    "page", [CHECKOUT / "README.md", *sorted(DOCS.glob("*.md"))], ids=lambda path: path.stem
)
def test_links_lead_somewhere(page):
    for token in MarkdownIt().enable("table").parse(page.read_text()):
        for child in token.children or ():
            to = str(child.attrs.get("href") or child.attrs.get("src") or "")
            if to and "://" not in to:
                path, _, heading = to.partition("#")
                other = (page.parent / path).resolve() if path else page
                assert other.is_relative_to(CHECKOUT), to
                assert other.exists(), to
                headings = re.findall(r"^#+ (.+)$", other.read_text(), re.M) if heading else []
                slugs = [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings]
                assert not heading or heading in slugs, to


def test_the_readme_leads_to_every_page():
    text = (CHECKOUT / "README.md").read_text()
    assert [page.name for page in DOCS.glob("*.md") if f"(docs/{page.name}" not in text] == []


def test_the_reference_has_every_setting_with_its_comment():
    text = (
        "# above\na:                # of a\n  b: [1, x]  # of b,\n             # and more\n"
        "  c: '#1'\nd: {}\n"
    )
    rows = runpy.run_path(str(DOCS / "configuration.py"))["settings"](text, "g.")
    assert list(map(tuple, rows)) == [
        ("g.a", "", "of a"),
        ("g.a.b", "[1, x]", "of b, and more"),
        ("g.a.c", "#1", ""),
        ("g.d", "{}", ""),
    ]
