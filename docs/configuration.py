"""Makes configuration.md of what stands in ``conf/``: python docs/configuration.py."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import yaml

CHECKOUT = Path(__file__).parents[1]
CONF = CHECKOUT / "conf"
PAGE = CHECKOUT / "docs" / "configuration.md"
HEAD = """\
# Configuration

Every group, its choices, and every setting with its default: `GROUP=CHOICE` and `KEY=VALUE` on
the command line, in any order. `python -m gatl --cfg job` prints all of them as your overrides
make them. This page is made of `conf/` by `make docs`; change the comments there.
"""


class Setting(NamedTuple):
    """A row: a dotted key, its default as YAML (empty for a group of settings), its comment."""

    key: str
    default: str
    comment: str


def settings(text: str, prefix: str) -> Iterator[Setting]:
    """Yield the settings of a YAML file in their order, each with the comment behind it."""
    node = yaml.compose(text)
    if isinstance(node, yaml.MappingNode):
        yield from _below(node, prefix, text.splitlines())


def _below(node: yaml.MappingNode, prefix: str, lines: list[str]) -> Iterator[Setting]:
    for name, value in node.value:
        key, line = f"{prefix}{name.value}", name.start_mark.line
        if key in ("defaults", "hydra") or key.endswith(".defaults"):
            continue
        group = isinstance(value, yaml.MappingNode) and bool(value.value)
        inline = value.start_mark.line == value.end_mark.line == line
        column = value.end_mark.column if inline else name.end_mark.column + 1
        comment = _comment(lines, line, column)
        if group:
            if comment:
                yield Setting(key, "", comment)
            yield from _below(value, f"{key}.", lines)
        else:
            yield Setting(key, _plain(value), comment)


def _plain(node: yaml.Node) -> str:
    """Write a value as one would on the command line."""
    match node:
        case yaml.SequenceNode():
            return f"[{', '.join(map(_plain, node.value))}]"
        case yaml.MappingNode():
            return f"{{{', '.join(f'{_plain(k)}: {_plain(v)}' for k, v in node.value)}}}"
    return str(node.value)


def _comment(lines: list[str], line: int, column: int) -> str:
    """Return what stands behind a value, with the lines of comment alone that go on."""
    match = re.match(r"\s*#\s*(.*)", lines[line][column:])
    if match is None:
        return ""
    more = []
    for following in lines[line + 1 :]:
        if not following.lstrip().startswith("#"):
            break
        more.append(following.strip().lstrip("# "))
    return " ".join([match[1], *more])


def _escaped(text: str) -> str:
    """Return the Markdown that shows a text as it is."""
    return re.sub(r"([*|<])", r"\\\1", text)


def _about(text: str) -> str:
    """Return the comment at the top of a file; lines that are set in are commands."""
    rows = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            command = line.startswith("#   ")
            rows.append(f"`{line.strip('# ')}`" if command else _escaped(line.strip("# ")))
    return "\n".join(rows)


def _taken(text: str) -> Iterator[Setting]:
    """Yield the choices of other groups that a file makes."""
    for entry in (yaml.safe_load(text) or {}).get("defaults", []):
        for name, choice in entry.items() if isinstance(entry, dict) else ():
            if name.startswith("override /") and not name.startswith("override /hydra"):
                yield Setting(name.removeprefix("override /"), str(choice), "this choice")


def _table(rows: list[Setting]) -> list[str]:
    if not rows:
        return []
    cells = [
        (f"`{r.key}`", f"`{r.default}`" if r.default else "", _escaped(r.comment)) for r in rows
    ]
    return [
        "| setting | default | meaning |",
        "|---|---|---|",
        *("| {} | {} | {} |".format(*c) for c in cells),
        "",
    ]


def page(conf: Path) -> str:
    """Return the whole page.

    Args:
        conf: The tree of YAML files.
    """
    main = (conf / "config.yaml").read_text(encoding="utf-8")
    parts = [HEAD, "## Whatever is chosen", "", *_table(list(settings(main, "")))]
    for entry in yaml.safe_load(main)["defaults"]:
        if not isinstance(entry, dict):
            continue
        ((name, default),) = entry.items()
        group = name.removeprefix("override ")
        if not (conf / group).is_dir():  # Hydra's own choices
            continue
        parts += [f"## {group}", ""]
        files = sorted(
            (conf / group).glob("*.yaml"), key=lambda path: (path.stem != default, path.stem)
        )
        for path in files:
            text = path.read_text(encoding="utf-8")
            whole = "@package _global_" in text
            note = " (the default)" if path.stem == default else ""
            parts += [f"### `{group}={path.stem}`{note}", ""]
            parts += [_about(text), ""] if _about(text) else []
            parts += _table(
                [*_taken(text), *settings(text, "" if whole else f"{group.replace('/', '.')}.")]
            )
    pretrain = (conf / "pretrain.yaml").read_text(encoding="utf-8")
    parts += ["## `python -m gatl.pretrain`", "", _about(pretrain), ""]
    parts += [*_table(list(settings(pretrain, "")))]
    return "\n".join(parts).rstrip("\n") + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(CONF), encoding="utf-8")
