"""The situations people ask about first: each a button of the fit panel, and a line a notebook can check."""

from dataclasses import dataclass, field

from .state import DEFAULTS, FitState


@dataclass(frozen=True)
class Preset:
    """A label, and the settings it stands for; all others go back to their defaults."""

    label: str
    why: str
    settings: dict = field(hash=False)

    def apply(self, state: FitState) -> None:
        state.update(**{**DEFAULTS, **self.settings})


def _preset(label: str, why: str, model: str, quant: str, card: str, **more) -> Preset:
    return Preset(label, why, {"model": model, "quant": quant, "card": card, **more})


PRESETS = (
    _preset("8B on 12 GB", "Llama 3 8B in Q4_K_M on an RTX 3060 12GB: the golden mean on the cheapest useful card",
            "llama-3-8b", "Q4_K_M", "rtx-3060-12gb"),
    _preset("7B on 16 GB", "Qwen2.5 7B in IQ4_XS on an RTX 4060 Ti 16GB, with 32,768 tokens of context",
            "qwen2.5-7b", "IQ4_XS", "rtx-4060-ti-16gb", context=32768),
    _preset("13B on 8 GB", "Llama 2 13B in Q3_K_S on 8 GB: its cache has no grouped heads, so the context decides",
            "llama-2-13b", "Q3_K_S", "rtx-4060-8gb", context=2048),
    _preset("34B on 24 GB", "Code Llama 34B in Q4_K_M on an RTX 3090", "codellama-34b", "Q4_K_M", "rtx-3090-24gb"),
    _preset("70B on 24 GB", "Llama 3 70B in Q4_K_M on one RTX 3090: part of it stays in RAM",
            "llama-3-70b", "Q4_K_M", "rtx-3090-24gb"),
    _preset("70B on 2 × 24 GB", "Llama 3 70B in Q4_K_M on two RTX 3090",
            "llama-3-70b", "Q4_K_M", "rtx-3090-24gb", cards=2),
    _preset("8x22B on 64 GB", "Mixtral 8x22B in Q3_K_S on 64 GB (an Instinct MI210)",
            "mixtral-8x22b", "Q3_K_S", "instinct-mi210-64gb"),
)
