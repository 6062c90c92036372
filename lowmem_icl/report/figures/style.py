"""How every figure looks: colours, sizes, fonts; the same on paper, on a screen and in grey."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import matplotlib
from matplotlib.colors import LinearSegmentedColormap, to_hex, to_rgb

# Okabe and Ito's colours, distinct under every kind of colour vision; their luminances differ too.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, RED, PURPLE = "#0072B2", "#D55E00", "#CC79A7"
GREY, PALE = "#8C8C8C", "#DADADA"
SMALL, NORMAL = 6.0, 7.0
"""Sizes of text in points: ticks and names, and all else."""
LINE = 0.6
"""Width of axes in points; of curves twice as much."""
DPI = 300

STYLE = {
    # Text stays text: it can be searched, and edited by whoever sets the paper.
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
    # The same numbers give the same bytes.
    "svg.hashsalt": "lowmem-icl",
    # The first comes with matplotlib, so sizes are the same everywhere; what a viewer has in its place is
    # no wider.
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "Helvetica", "sans-serif"],
    "font.size": NORMAL,
    "axes.titlesize": NORMAL,
    "axes.labelsize": NORMAL,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "legend.fontsize": SMALL,
    "figure.labelsize": NORMAL,
    "figure.titlesize": NORMAL,
    "axes.titlepad": 3.0,
    "axes.labelpad": 2.0,
    "axes.titlelocation": "left",
    "axes.linewidth": LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "lines.linewidth": 2 * LINE,
    "lines.markersize": 3.0,
    "grid.linewidth": LINE / 2,
    "grid.color": PALE,
    "xtick.major.size": 2.0,
    "ytick.major.size": 2.0,
    "xtick.major.width": LINE,
    "ytick.major.width": LINE,
    "xtick.major.pad": 2.0,
    "ytick.major.pad": 2.0,
    "xtick.minor.visible": False,
    "ytick.minor.visible": False,
    "legend.frameon": False,
    "legend.handlelength": 1.4,
    "legend.handletextpad": 0.5,
    "legend.columnspacing": 1.2,
    "legend.borderaxespad": 0.2,
    "legend.borderpad": 0.1,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "savefig.dpi": DPI,
    # Dollar signs in names are no formulas.
    "text.parse_math": False,
    "axes.formatter.use_mathtext": False,
}


@contextmanager
def figure_style() -> Iterator[None]:
    """Draw, lay out and save in this style, whatever the user's matplotlibrc says."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        # Names in scripts that the font lacks appear as boxes in PDF and PNG; an SVG's viewer has the glyphs.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def shot_colours(shots: Sequence[int]) -> dict[int, str]:
    """Return a colour per shot count, darker for more demonstrations, so that grey keeps their order."""
    if len(shots) == 1:
        return {shots[0]: BLUE}
    ramp = LinearSegmentedColormap.from_list("shots", [SKY, BLUE, BLACK])
    return {n_shots: to_hex(ramp(number / (len(shots) - 1))) for number, n_shots in enumerate(shots)}


def text_colour(background: str | tuple[float, ...]) -> str:
    """Return black or white, whichever has the higher contrast with a background by WCAG's luminance."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(background)]
    luminance = sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return "black" if (luminance + 0.05) ** 2 > 0.05 * 1.05 else "white"
