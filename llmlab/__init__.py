"""llmlab: will it fit, what does it cost, and what to do if it does not; predicted, then measured.

Names are imported on first use, so that `import llmlab` costs next to nothing and never imports torch.
"""

from importlib import import_module as _import_module

__version__ = "0.1.0"

_FACE = {  # public name -> (module, name there)
    "model": ("shapes", "model_spec"), "models": ("catalog", "models"), "gpu": ("catalog", "gpu"),
    "gpus": ("catalog", "gpus"), "machine": ("hardware", "machine"), "doctor": ("hardware", "doctor"),
    "fit": ("fitting", "fit"), "fit_map": ("fitmap", "fit_map"), "measured": ("reconcile", "measured"),
    "fit_hosts": ("clustering", "fit_hosts"),
    "size": ("memory", "size_of"), "mix": ("memory", "mix_of"),
    "fetch": ("sources", "fetch"), "local_models": ("sources", "local_models"),
    "plan": ("offload.planning", "plan"), "best": ("advice", "best"), "claims": ("verdicts", "claims"),
    "load": ("loading", "load"), "decoder": ("starting", "decoder"),
    "quantize_gguf": ("requantizing", "quantize_gguf"),
    "perplexity": ("quality", "perplexity"), "divergence": ("quality", "divergence"),
    "importance": ("quality", "importance"), "read_importance": ("quality", "read_importance"),
    "serve": ("server", "serve"), "Endpoint": ("endpoints", "Endpoint"),
    "evaluate": ("evaluation", "evaluate"), "sweep": ("sweeps", "sweep"),
    "router": ("endpoints", "router"),
    "LabError": ("errors", "LabError"), "formats": ("formats", None),
    "kernels": ("kernels", None), "lossless": ("lossless", None),
}
__all__ = [*_FACE, "__version__"]


def __getattr__(name: str):
    if name not in _FACE:
        raise AttributeError(f"llmlab has no {name!r}; it has {', '.join(sorted(_FACE))}")
    module, inner = _FACE[name]
    found = _import_module(f"{__name__}.{module}")
    value = found if inner is None else getattr(found, inner)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_FACE})
