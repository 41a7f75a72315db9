"""What an image needs of the machine that restores it: names and values, and what to say where they are not there.

Pins are written into a snapshot's manifest, and compared before a restore. A name that only one side knows is not
compared: an old snapshot pins less, a newer one more.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torpor.core.errors import MachineUnfit

DRIVER, MACHINE, RUNSC, RUNSC_VERSION, FLAGS, CPU_FEATURES, IMAGE = (
    "driver",
    "machine",
    "runsc_sha256",
    "runsc_version",
    "flags",
    "cpu_features",
    "image_digest",
)

Pins = Mapping[str, str]


class PinsUnmet(MachineUnfit):
    """A snapshot needs another machine, or something that this one lacks: the snapshot itself is well."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rule:
    """What it means that one pin is not met, and what to do then; both are told what was pinned and what is here."""

    name: str
    reason: Callable[[Pins, Pins], str]
    remedy: Callable[[Pins], str]
    differs: Callable[[str, str], bool] = lambda pinned, here: pinned != here


_RULES = (
    _Rule(
        name=DRIVER,
        reason=lambda pinned, here: f"the driver {pinned[DRIVER]} made it, here is {here[DRIVER]}",
        remedy=lambda _: "Use a Torpor that has that driver.",
    ),
    _Rule(
        name=MACHINE,
        reason=lambda pinned, here: f"it is of a machine of kind {pinned[MACHINE]}, this one is {here[MACHINE]}",
        remedy=lambda _: "Resume it on a machine of that kind.",
    ),
    _Rule(
        name=CPU_FEATURES,
        reason=lambda pinned, here: f"its CPU had {_only_in(pinned, here, CPU_FEATURES)}, which this one lacks",
        remedy=lambda _: "Resume it on a machine whose CPU has that.",
        differs=lambda pinned, here: not set(pinned.split()) <= set(here.split()),
    ),
    _Rule(
        name=RUNSC,
        reason=lambda pinned, _: f"runsc {pinned.get(RUNSC_VERSION, '')} made it, and that very binary is not here",
        remedy=lambda pinned: (
            f"Put it to TORPOR_HOME/bin/{kept_name(pinned[RUNSC])}/runsc, which is called after its SHA-256."
        ),
    ),
    _Rule(
        name=FLAGS,
        reason=lambda pinned, here: (
            f"runsc ran with {_only_in(pinned, here, FLAGS)}, here it runs with {_only_in(here, pinned, FLAGS)}"
        ),
        remedy=lambda _: "Resume it as the kind of user that ran it, root or an ordinary one.",
    ),
    _Rule(
        name=IMAGE,
        reason=lambda pinned, here: f"its root image is {pinned[IMAGE][:16]}, the session's is {here[IMAGE][:16]}",
        remedy=lambda _: "Restore it into a session with the same --image and mounts.",
    ),
)


def check_pins(what: str, pinned: Pins, here: Pins) -> None:
    """Compare what was pinned with what is here.

    Raises:
        PinsUnmet: `pins_unmet`, with the first reason why `what`, which has these pins, cannot be restored here.
    """
    for rule in _RULES:
        if rule.name in pinned and rule.name in here and rule.differs(pinned[rule.name], here[rule.name]):
            reason = rule.reason(pinned, here)
            hint = f"{rule.remedy(pinned)} Or give up the agent's memory: torpor resume --boot."
            raise PinsUnmet("pins_unmet", f"cannot restore {what} on this machine: {reason}", hint=hint)


def kept_name(runsc_sha256: str) -> str:
    """The directory, below Torpor's own programs, that keeps a runsc."""
    return f"runsc-{runsc_sha256[:16]}"


def _only_in(one: Pins, other: Pins, name: str) -> str:
    return " ".join(sorted(set(one[name].split()) - set(other[name].split()))) or "fewer"
