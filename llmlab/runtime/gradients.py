"""`without_gradients`: torch.no_grad as a decorator that an interrupt cannot leave switched off."""

from collections.abc import Callable
from functools import wraps

import torch

# In C, so that no signal is looked at between the call and its effect.
_switch = torch._C._set_grad_enabled


def without_gradients(function: Callable) -> Callable:
    """`function` with gradients off, and on again after it if they were on, however it ends.

    torch.no_grad restores them in a Python method, at whose first instruction CPython handles signals: a Ctrl-C that comes
    just then leaves a notebook's thread without gradients until it is started anew, and whatever it trains next fails."""
    @wraps(function)
    def quiet(*given, **more):
        before = torch.is_grad_enabled()
        try:
            _switch(False)
            return function(*given, **more)
        finally:
            _switch(before)
    return quiet
