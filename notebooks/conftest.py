"""nbval compares what is printed: words and numbers; never pictures, widgets or warnings."""

NEVER_COMPARED = (
    "application/vnd.plotly.v1+json",            # large, and different with each version of plotly
    "application/vnd.jupyter.widget-view+json",  # holds a random id
    "application/javascript",
    "text/html",                                 # the same table as text/plain, which is compared
    "stderr",                                    # warnings, progress bars
)


def pytest_collectstart(collector):
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += NEVER_COMPARED
