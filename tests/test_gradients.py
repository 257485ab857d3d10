"""Gradients are off inside, as they were outside, whatever ends it and whenever."""

import signal

import pytest

torch = pytest.importorskip("torch")
from llmlab.runtime.gradients import without_gradients  # noqa: E402


@without_gradients
def busy(turns: int = 1, raises: bool = False) -> bool:
    for _ in range(turns):
        assert not torch.is_grad_enabled()
    if raises:
        raise RuntimeError("broken")
    return torch.is_grad_enabled()


def test_off_inside_and_as_it_was_outside():
    assert busy() is False and torch.is_grad_enabled()
    with pytest.raises(RuntimeError, match="broken"):
        busy(raises=True)
    assert torch.is_grad_enabled()
    with torch.no_grad():
        assert busy() is False and not torch.is_grad_enabled()
    learning = torch.ones(2, requires_grad=True)
    assert without_gradients(lambda: learning * 2)().is_leaf and busy.__name__ == "busy"


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers that interrupt")
def test_interrupts_at_any_moment_leave_gradients_on():
    """torch.no_grad as a decorator loses them within the first ten interrupts of this kind."""
    interrupted, watching = 0, False

    def press(_, frame):
        if watching:
            raise KeyboardInterrupt

    plain = signal.signal(signal.SIGALRM, press)
    try:
        signal.setitimer(signal.ITIMER_REAL, 1e-4, 5e-5)
        while interrupted < 2000:
            try:
                watching = True
                while True:
                    busy()
            except KeyboardInterrupt:
                watching = False
                interrupted += 1
                assert torch.is_grad_enabled(), interrupted
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, plain)
