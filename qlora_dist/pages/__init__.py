"""HTML pages: one look, charts, the page of a run. Each page is one file that needs no network and no server.

curves     the numbers of a run as a bounded number of points; history: its starts and ends
run_files  what a run directory says, read for a page
report     the page of one run, or of several laid over each other
bars       horizontal bars, as boxes of HTML
render     templates, escaping, the content security policy; assets/: look.css, charts.js, uPlot

Charts are uPlot's (MIT, see assets/README.md): its script travels in the wheel and in each page with charts. It was
chosen in November 2026 by the size of what a page carries, and by what a training run pays (10,000 steps, six charts):

    uPlot 1.6.32               53 KB     6 ms for a page of 128 KB; imports jinja2 (30 ms)
    Chart.js 4.6.1             210 KB    as uPlot
    vega, vega-lite, embed     832 KB    as uPlot
    plotly.js, basic or whole  1.2, 4.8 MB
    matplotlib 3.11 as SVG     267 KB    150 ms; imports in 0.5 s, 35 MB to install; one colour scheme, no zoom

A page is opened on a phone, or copied from a cluster: it should be small, and light or dark as its reader is. Without
its script (a viewer that runs none) it still has every table.
"""

from .bars import Bar, BarChart, Mark
from .curves import Curves
from .history import append_event
from .render import SCRIPTS, render
from .report import write_report
from .run_files import holds_run, read_curves, read_run

__all__ = [
    "SCRIPTS",
    "Bar",
    "BarChart",
    "Curves",
    "Mark",
    "append_event",
    "holds_run",
    "read_curves",
    "read_run",
    "render",
    "write_report",
]
