"""A gVisor driver for each runsc: the present one makes new sandboxes, an image is restored by the one that wrote it.

Binaries are kept by their hashes (tools.py). Each sandbox's directory says which one made it, for whoever adopts it.
"""

from pathlib import Path

from torpor.core.clock import Clock
from torpor.core.pins import RUNSC, Pins
from torpor.sandbox.driver import SandboxPlan
from torpor.sandbox.gvisor import GvisorDriver, Runsc
from torpor.sandbox.tools import find_kept


class GvisorDrivers:
    """All of them share one state directory, so that each finds the sandboxes of all."""

    def __init__(self, *, runsc: Runsc, tools_directory: Path, state_directory: Path, clock: Clock) -> None:
        self._tools_directory = tools_directory
        self._state_directory = state_directory
        self._clock = clock
        self._drivers: dict[str, GvisorDriver] = {}
        self.present = self._driver(runsc)

    def for_image(self, pins: Pins) -> GvisorDriver:
        """The one that wrote it, else the present one, whose pins are others then."""
        return self._of(pins.get(RUNSC, ""))

    def of_sandbox(self, plan: SandboxPlan) -> GvisorDriver:
        """The one that made it, else the present one."""
        try:
            return self._of(plan.made_by.read_text().strip())
        except FileNotFoundError:
            return self.present

    def _of(self, sha256: str) -> GvisorDriver:
        if sha256 and sha256 not in self._drivers:
            kept = find_kept(self._tools_directory, sha256, self._clock)
            if kept is None:
                return self.present
            self._driver(kept)
        return self._drivers.get(sha256, self.present)

    def _driver(self, runsc: Runsc) -> GvisorDriver:
        made = GvisorDriver(runsc=runsc, state_directory=self._state_directory, clock=self._clock)
        return self._drivers.setdefault(runsc.sha256, made)
