"""Serving without the model: the engine's own scheduler and blocks, and a cost for each step (of a card, or learnt from this
machine), say what throughput and latency would be. All modelled.

`setup("llama-3-8b", "rtx-4090-24gb")` is a model on a card; `simulate_setup(setup, arrivals)` one run; `compare_policies` what
paging is worth, `throughput_of` curves against load; `fit_cost(engine.history)` the cost of this machine, for `simulate`;
`measured` a real run in the same words, to stand beside.
"""

from .costs import Cost, Load, Matrices, Setup, cost_of, load_of, setup, setup_of
from .events import BANDS, Moment, Served, Simulation, StepCost, simulate, simulate_setup
from .fitted import Fitted, Step, fit_cost
from .measuring import Beside, Serving, beside_measured, learnt, measured
from .published import beside_published
from .sweeping import WAYS, Policies, bearable_rate, compare_policies, serve, throughput_of

__all__ = ["BANDS", "Beside", "Cost", "Fitted", "Load", "Matrices", "Moment", "Policies", "Served", "Serving", "Setup",
           "Simulation", "Step", "StepCost", "WAYS", "bearable_rate", "beside_measured", "beside_published",
           "compare_policies", "cost_of", "fit_cost", "learnt", "load_of", "measured", "serve", "setup", "setup_of", "simulate",
           "simulate_setup", "throughput_of"]
