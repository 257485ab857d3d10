"""Settable: a state whose settings are traits, changed together, and refused by name where there are none."""

import traitlets as t

from ..errors import LabError


class Settable(t.HasTraits):
    """SETTINGS: the names of what may be set. WHOSE: whose they are, " of a chat", where it must be said."""

    SETTINGS: tuple[str, ...] = ()
    WHOSE = ""

    def update(self, **settings) -> None:
        """Change several settings, and follow them once. Raises LabError for a name that is no setting."""
        with self.hold_trait_notifications():
            for name, value in self._known(settings).items():
                setattr(self, name, value)

    def _known(self, settings: dict) -> dict:
        for name in settings:
            if name not in self.SETTINGS:
                raise LabError(f"{name!r} is no setting{self.WHOSE}; there are {', '.join(self.SETTINGS)}")
        return settings


def settable(defaults: dict) -> type[Settable]:
    """A class to derive a state from, with these settings."""
    traits = {name: t.Any(value) for name, value in defaults.items()}
    return type("Settings", (Settable,), {**traits, "SETTINGS": tuple(defaults)})
