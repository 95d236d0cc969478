"""Draw a random batch beside a clustered one, from the vectors of the demo's training points.

    ngame demo && python docs/picture.py ngame-demo

VECTORS is the folder of a run of `ngame demo`, or a .npy file of its training points' vectors. The
drawing is `docs/batches.svg`: a row and a column for each point of a batch, and the cosine of each
pair as a shade. Both batches come from `ngame.ClusterBatchSampler`.
"""

import argparse
from html import escape
from pathlib import Path

import numpy as np

import ngame
from ngame.demo.see_also import see_also_dataset

BATCH = 24
CLUSTER = 4
SEED = 0
CELL = 15
NAMES = 208  # width of a panel's names
HEAD = 46
# The least cosine of each shade, and its opacity: shades fade into a white page and a black one.
SHADES = ((0.2, 0.2), (0.35, 0.4), (0.5, 0.65), (0.65, 1.0))
BLUE, GREY = "#2f81f7", "#7d8590"


def main() -> None:
    """Read the vectors, draw, and print how near the points of each batch are."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("vectors", type=Path, help="run of `ngame demo`, or .npy file")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path(__file__).with_name("batches.svg")
    )
    options = parser.parse_args()
    texts = see_also_dataset().train_texts
    if options.vectors.is_dir():
        vectors = np.asarray(ngame.Model.load(options.vectors).encode(texts))
    else:
        vectors = np.load(options.vectors).astype(np.float32)
    names = [text.partition(":")[0].partition(" ")[0] for text in texts]
    batches = ngame.ClusterBatchSampler(
        len(names), BATCH, cluster_size=CLUSTER, start_epoch=0, seed=SEED
    )
    panels = []
    for title in ("Random batch", "Clustered batch"):
        rows = np.asarray(next(iter(batches)))
        cosines = vectors[rows] @ vectors[rows].T
        others = cosines[~np.eye(BATCH, dtype=bool)].reshape(BATCH, -1)
        nearest = others.max(axis=1).mean()
        about = f"mean cosine of a point and its nearest in the batch: {nearest:.2f}"
        print(f"{title}: {about}")
        panels.append(panel(title, about, [names[row] for row in rows], cosines))
        batches.refresh(vectors)
    options.output.write_text(drawing(panels), encoding="utf8")


def panel(title: str, about: str, names: list[str], cosines: np.ndarray) -> str:
    """One batch: names on the left, shades on the right."""
    side = CELL * len(names)
    lines = [
        f'<text x="0" y="15" class="title">{title}</text>',
        f'<text x="0" y="33" class="about">{about}</text>',
        f'<rect x="{NAMES}" y="{HEAD}" width="{side}" height="{side}" fill="{GREY}" '
        'opacity="0.12"/>',
    ]
    for row, name in enumerate(names):
        y = HEAD + CELL * row + 11
        lines.append(f'<text x="{NAMES - 6}" y="{y}" class="name">{escape(short(name))}</text>')
    levels = np.searchsorted([bound for bound, _ in SHADES], cosines, side="right")
    itself = np.eye(len(names), dtype=bool)
    for level, (_, opacity) in enumerate(SHADES, 1):
        lines.append(cells((levels == level) & ~itself, BLUE, opacity))
    return "\n".join([*lines, cells(itself, GREY, 0.35)])


def cells(where: np.ndarray, colour: str, opacity: float) -> str:
    """The squares of some pairs, as one path."""
    squares = "".join(
        f"M{NAMES + CELL * column} {HEAD + CELL * row}h{CELL - 1}v{CELL - 1}h-{CELL - 1}z"
        for row, column in zip(*np.nonzero(where), strict=True)
    )
    return f'<path fill="{colour}" opacity="{opacity}" d="{squares}"/>'


def short(name: str, length: int = 32) -> str:
    """A dotted name that fits: its first parts go first."""
    while len(name) > length and "." in name:
        name = name.partition(".")[2]
    return name


def drawing(panels: list[str]) -> str:
    """The SVG of the panels, side by side, with its legend."""
    width, gap = NAMES + CELL * BATCH, 36
    total, height = len(panels) * (width + gap) - gap, HEAD + CELL * BATCH
    groups = "\n".join(
        f'<g transform="translate({number * (width + gap)} 0)">\n{text}\n</g>'
        for number, text in enumerate(panels)
    )
    legend, x = [], NAMES
    for bound, opacity in SHADES:
        legend.append(
            f'<rect x="{x}" y="{height + 12}" width="14" height="14" fill="{BLUE}" '
            f'opacity="{opacity}"/>'
        )
        legend.append(f'<text x="{x + 19}" y="{height + 23}" class="about">from {bound}</text>')
        x += 88
    legend.append(f'<text x="{NAMES - 6}" y="{height + 23}" class="key">cosine</text>')
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} {height + 32}" \
font-family="ui-sans-serif, system-ui, sans-serif">
<title>Cosines within a random batch and within a clustered batch of {BATCH} points</title>
<style>
.title {{ font-size: 16px; font-weight: 600; fill: {BLUE}; }}
.about, .key {{ font-size: 12px; fill: {GREY}; }}
.name {{ font-size: 11px; fill: {GREY}; text-anchor: end; font-family: ui-monospace, monospace; }}
.key {{ text-anchor: end; }}
</style>
{groups}
{chr(10).join(legend)}
</svg>
"""


if __name__ == "__main__":
    main()
