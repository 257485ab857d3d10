"""What is seen in JupyterLab: pure figures -> state (traits) -> view (widgets), never mixed.

The only room that imports ipywidgets and plotly. What runs a model is imported on first use: it brings torch.
"""

from importlib import import_module as _import_module

from .figures import measured_figure
from .fit_panel import FitExplorer
from .live import Chart, LiveFigure
from .map_panel import FitMapExplorer
from .map_state import MapState
from .state import FitState

_RUNNING = {      # name -> module that needs torch, or time
    "AdviceState": "advice_state", "Advisor": "advice_panel", "advice_figure": "advice_figures",
    "evaluation_figure": "evaluation_figures",
    "CacheExplorer": "cache_panel", "CacheState": "cache_state", "HeatState": "cache_heat",
    "ChatPanel": "chat_panel", "ChatState": "chat_state", "CompileExplorer": "compile_panel", "CompileState": "compile_state",
    "HybridPanel": "hybrid_panel", "HybridState": "hybrid_state",
    "OffloadExplorer": "offload_panel", "OffloadState": "offload_state", "RunState": "offload_run",
    "ServingExplorer": "serving_panel", "ServingState": "serving_state", "ServingRun": "serving_run",
    "QuantizationExplorer": "quantization_panel", "SweepChart": "sweep_chart",
    "QuantizationState": "quantization_state", "TwinState": "quantization_twin", "quality_figure": "quantization_figures",
    "rates_figure": "quantization_figures",
}

__all__ = ["Chart", "FitExplorer", "FitMapExplorer", "FitState", "LiveFigure", "MapState", "measured_figure", *_RUNNING]


def __getattr__(name: str):
    if name not in _RUNNING:
        raise AttributeError(f"llmlab.lab has no {name!r}; it has {', '.join(sorted(__all__))}")
    value = globals()[name] = getattr(_import_module(f"{__name__}.{_RUNNING[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_RUNNING})
