"""What is seen in JupyterLab: pure figures -> state (traits) -> view (widgets), never mixed.

The only room that imports ipywidgets and plotly.
"""

from .fit_panel import FitExplorer
from .live import Chart, LiveFigure
from .state import FitState

__all__ = ["Chart", "FitExplorer", "FitState", "LiveFigure"]
