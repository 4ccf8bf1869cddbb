"""Draws a chromosome on the 58 layers of SE-DenseNet-121, chromosome.svg, as `make docs` does.

The SVG is written as text, so that its colours follow light and dark.
"""

from pathlib import Path

PICTURE = Path(__file__).with_suffix(".svg")
BLOCKS = (6, 12, 24, 16)
INCLUDED, FROZEN = 42, 14
TOP, HEIGHT, STEP = 56, 46, 13
HEAD = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 912 168" font-family="system-ui, sans-serif" \
font-size="11">
<title>A chromosome on the 58 layers of SE-DenseNet-121</title>
<style>
.f{fill:#4c78a8} .n{fill:#f58518} .o{fill:none;stroke:#999;stroke-dasharray:2 2} .t{fill:#555} \
.b{fill:none;stroke:#777}
@media (prefers-color-scheme: dark){.t{fill:#ccc}}
</style>"""


def _kind(layer: int) -> str:
    """Return the class of a layer's box, counted from 1: frozen, trained, or left out."""
    return "f" if layer <= FROZEN else "n" if layer <= INCLUDED else "o"


def _box(x: int, width: int, kind: str, inset: int = 0) -> str:
    y, height = TOP + inset, HEIGHT - 2 * inset
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="2" class="{kind}"/>'


def _text(x: float, y: int, words: str) -> str:
    return f'<text x="{x}" y="{y}" class="t" text-anchor="middle">{words}</text>'


def picture() -> str:
    """Return the SVG."""
    rows = [HEAD, _box(20, 22, "f"), _text(31, 118, "stem")]
    x, layer = 50, 0
    ends = {0: 42}  # right edges by layer; 0 is the stem
    for block, n_layers in enumerate(BLOCKS, start=1):
        start = x
        for layer in range(layer + 1, layer + n_layers + 1):  # noqa: B020 - goes on counting
            rows.append(_box(x, 11, _kind(layer)))
            ends[layer] = x + 11
            x += STEP
        rows.append(_text((start + ends[layer]) / 2, 118, f"block {block} · {n_layers}"))
        if block < len(BLOCKS):  # the transition; frozen if the block is, whole
            rows.append(_box(ends[layer] + 4, 6, "o" if layer >= INCLUDED else _kind(layer), 10))
            x = ends[layer] + 16
    rows += [_box(ends[layer] + 8, 40, "n"), _text(ends[layer] + 28, 118, "head")]
    frozen, built = ends[FROZEN], ends[INCLUDED]
    rows += [
        f'<path d="M20 46 v-6 H{frozen} v6" class="b"/>',
        _text((20 + frozen) / 2, 35, f"frozen_layers F = {FROZEN}: stem and first {FROZEN} layers"),
        f'<path d="M50 130 v6 H{built} v-6" class="b"/>',
        _text((50 + built) / 2, 150, f"included_layers L = {INCLUDED}: the rest is not built"),
    ]
    for x, kind, words in ((582, "f", "frozen"), (657, "n", "trained"), (734, "o", "left out")):
        rows.append(
            f'<rect x="{x}" y="8" width="11" height="11" class="{kind}"/>'
            f'<text x="{x + 16}" y="18" class="t">{words}</text>'
        )
    return "\n".join([*rows, "</svg>"]) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
