"""The picture of ``python -m benchmarks.routing goodput``: the default beside the fixed ways, and after a change."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.bench.picture import COLOURS, TINT
from benchmarks.routing.goodput import CONTENDERS, LEAST_SHARE, WAYS, WINDOW_S, GoodputRow, good_share, way_share

if TYPE_CHECKING:
    from benchmarks.routing.goodput_report import GoodputReport

WIDTH_INCHES = 11.69  # of A4, landscape
ROW_INCHES = 0.2
PANEL_INCHES = 1.6
MARKERS = dict(zip(CONTENDERS, "osD^", strict=True))
COLOUR_OF = dict(zip(CONTENDERS, COLOURS, strict=False))


def draw(report: GoodputReport, path: Path) -> None:
    """Write the page.  The suffix of `path` says in which format."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    changing = [row for row in report.rows if row.settlings]
    heights = [1.0 + ROW_INCHES * len(report.rows), *[PANEL_INCHES] * len(changing)]
    with mpl.rc_context({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "none"}):
        figure = Figure(figsize=(WIDTH_INCHES, sum(heights) + 0.5), layout="constrained")
        overview, *panels = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
        _draw_overview(overview, report)
        for axes, row in zip(panels, changing, strict=True):
            _draw_row(axes, row)
        figure.suptitle(
            "Goodput: the default and what one could choose instead", x=0.015, ha="left", fontsize=13, fontweight="bold"
        )
        figure.savefig(path, dpi=150)


def _draw_overview(axes: Any, report: GoodputReport) -> None:
    """Draw each contender's share of the requests in time, one line for each scenario."""
    rows = list(reversed(report.rows))
    axes.hlines(range(len(rows)), 0, 100, color="#dddddd", linewidth=0.6)
    for contender in reversed(CONTENDERS):
        shares = [100 * row.by_contender[contender].good_share for row in rows]
        size = 40 if contender == "default" else 16
        axes.scatter(
            shares, range(len(rows)), s=size, marker=MARKERS[contender], color=COLOUR_OF[contender], label=contender
        )
    axes.scatter(
        [100 * row.oracle_share for row in rows], range(len(rows)), s=30, marker="|", color=TINT, label="oracle"
    )
    names = [f"{row.scenario}{' (held out)' if row.is_held_out else ''}" for row in rows]
    axes.set_yticks(range(len(rows)), names)
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):
        if row.is_lost:
            label.set_color(COLOURS[1])
            label.set_fontweight("bold")
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.set_xlim(-1, 101)
    axes.set_xlabel(f"% of the requests in time (bold: the default is below {LEAST_SHARE:g} of the best fixed way)")
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(CONTENDERS) + 1)


def _draw_row(axes: Any, row: GoodputRow) -> None:
    """Draw how many of the requests of each time are served in which way, and how many in time."""
    seconds = row.by_contender["default"].seconds
    starts = range(max(1, len(seconds) - WINDOW_S + 1))
    moments = [start + WINDOW_S / 2 for start in starts]
    windows = [seconds[start : start + WINDOW_S] for start in starts]
    shares = [[100 * way_share(window, way) for window in windows] for way in WAYS]
    axes.stackplot(moments, shares, labels=WAYS, colors=COLOURS[2 : 2 + len(WAYS)], alpha=0.35, linewidth=0)
    in_time = [100 * good_share(window) for window in windows]
    axes.plot(moments, in_time, color=COLOUR_OF["default"], linewidth=1.4, label="in time")
    for each in row.settlings:
        axes.axvline(each.change_s, color=TINT, linewidth=0.8, linestyle=":")
    axes.set_ylim(0, 105)
    axes.set_xlim(0, len(seconds))
    axes.set_title(f"{row.scenario}: % of the requests, windows of {WINDOW_S} s by arrival", loc="left", fontsize=8)
    axes.set_xlabel("seconds")
    axes.legend(frameon=False, loc="lower left", ncols=len(WAYS) + 1, fontsize=7)
