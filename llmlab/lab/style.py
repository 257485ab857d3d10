"""One look for every figure, readable on light and dark pages and without colour vision."""

GREY = "#808080"                       # readable on white and on black
GRID = "rgba(128,128,128,.25)"
FAINT = "rgba(128,128,128,.12)"

# Okabe and Ito's palette ("Color Universal Design", 2008): told apart with any kind of colour vision.
BLUE, ORANGE, SKY, GREEN = "#0072B2", "#E69F00", "#56B4E9", "#009E73"
RED, PINK, YELLOW = "#D55E00", "#CC79A7", "#F0E442"

TERMS = {  # name of a term -> (what a legend calls it, colour)
    "weights": ("weights", BLUE), "kv_cache": ("KV cache", ORANGE), "recurrent": ("recurrent state", PINK),
    "compute": ("compute", SKY), "overhead": ("overhead", "#999999"), "output": ("output", GREEN),
    "repacked": ("repacked copies", YELLOW),
    # beside the model, where there is any: Paul Tol's muted palette, told apart with any kind of colour vision too
    "projector": ("projector", "#882255"), "draft": ("draft model", "#44AA99"), "draft_cache": ("draft's cache", "#DDCC77"),
    "draft_compute": ("draft's compute", "#88CCEE"), "mtp": ("multi-token prediction", "#AA4499"),
}
VERDICTS = {"fits": ("✔", GREEN), "may spill": ("≈", ORANGE), "does not fit": ("✘", RED)}


def layout(**more) -> dict:
    """A plotly layout for both themes: transparent, grey text, the legend in a row above."""
    axis = {"gridcolor": GRID, "zerolinecolor": GRID, "linecolor": GRID}
    return {
        "template": None, "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": GREY, "size": 13}, "margin": {"l": 12, "r": 24, "t": 40, "b": 44},
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": GREY, "activecolor": RED, "orientation": "v"},
        "legend": {"orientation": "h", "x": 0, "xref": "container", "xanchor": "left", "y": 1, "yref": "container",
                   "yanchor": "top", "traceorder": "normal", "font": {"size": 12}},
        "hoverlabel": {"align": "left", "namelength": -1, "font": {"size": 13}},
        **more, **{name: {**axis, **more.get(name, {})} for name in ("xaxis", "yaxis")},
    }


def on_paper(picture: dict) -> dict:
    """A picture for a white page."""
    dark = {**picture["layout"].get("font", {}), "color": "#444"}
    return {**picture, "layout": {**picture["layout"], "paper_bgcolor": "#fff", "font": dark}}
