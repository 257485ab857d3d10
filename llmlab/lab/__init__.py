"""What is seen in JupyterLab: pure figures -> state (traits) -> view (widgets), never mixed.

The only room that imports ipywidgets and plotly.
"""

from .figures import measured_figure
from .fit_panel import FitExplorer
from .live import Chart, LiveFigure
from .map_panel import FitMapExplorer
from .map_state import MapState
from .state import FitState

__all__ = ["Chart", "FitExplorer", "FitMapExplorer", "FitState", "LiveFigure", "MapState", "measured_figure"]
