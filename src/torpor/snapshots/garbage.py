"""What of a store nobody needs: decided from a listing, the roots, and what manifests name. Pure.

An object goes if it is older than the grace period and nothing that stays needs it. What stays: roots, manifests that
are younger than that (their checkpoint may be about to be committed), and the packs that any of these name.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import TypeAlias

from torpor.snapshots.backend import Entry

KINDS = ("manifests", "packs", "probes", "condemned", "holders", "owners", "blobs")
"""Every kind of object that a version of Torpor puts; `blobs` are the event log's, and collected with their session."""

_NS = 1_000_000_000

Named: TypeAlias = "Mapping[str, AbstractSet[str]]"
"""Keys of packs by the key of the manifest that names them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """A store at one instant. What is not in it is not touched."""

    manifests: Mapping[str, Entry]
    packs: Mapping[str, Entry]
    probes: Mapping[str, Entry]
    blobs: Mapping[str, Entry]
    unknown: Sequence[Entry]
    now_ns: int

    @staticmethod
    def of(entries: Iterable[Entry], now_ns: int) -> "Listing":
        kinds: dict[str, dict[str, Entry]] = {}
        for entry in entries:
            kinds.setdefault(entry.key.partition("/")[0], {})[entry.key] = entry
        return Listing(
            manifests=kinds.get("manifests", {}),
            packs=kinds.get("packs", {}),
            probes=kinds.get("probes", {}),
            blobs=kinds.get("blobs", {}),
            unknown=[entry for kind, found in kinds.items() if kind not in KINDS for entry in found.values()],
            now_ns=now_ns,
        )

    def older(self, entries: Mapping[str, Entry], seconds: float) -> dict[str, Entry]:
        return {key: entry for key, entry in entries.items() if self.now_ns - entry.written_ns >= seconds * _NS}


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepPlan:
    """What goes, in the order in which it does."""

    manifests: Sequence[Entry]
    packs: Sequence[Entry]
    probes: Sequence[Entry]
    young_bytes: int
    """Of what nothing needs either, and is too young to go."""

    @property
    def entries(self) -> Sequence[Entry]:
        return [*self.manifests, *self.packs, *self.probes]

    @property
    def stored_bytes(self) -> int:
        return sum(entry.stored_bytes for entry in self.entries)


def staying(listing: Listing, roots: Collection[str], grace_seconds: float) -> set[str]:
    """Keys of the manifests that stay, whose packs have to be known for a plan."""
    return {*roots, *(listing.manifests.keys() - listing.older(listing.manifests, grace_seconds).keys())}


def plan_sweep(listing: Listing, roots: Collection[str], named: Named, grace_seconds: float) -> SweepPlan:
    """Args:
    roots: keys of the manifests that rows name.
    named: of every manifest that is `staying`.
    """
    stays = staying(listing, roots, grace_seconds)
    needed = _needed(stays, named)
    old = listing.older(listing.packs, grace_seconds)
    going = {key: entry for key, entry in old.items() if key not in needed}
    rooted = _needed(roots, named)
    young = [entry for key, entry in listing.packs.items() if key not in rooted and key not in going]
    young += [entry for key, entry in listing.manifests.items() if key in stays and key not in roots]
    return SweepPlan(
        manifests=[entry for key, entry in listing.manifests.items() if key not in stays],
        packs=list(going.values()),
        probes=list(listing.older(listing.probes, grace_seconds).values()),
        young_bytes=sum(entry.stored_bytes for entry in young),
    )


def still_garbage(condemned: Collection[str], roots: Collection[str], named: Named) -> tuple[list[str], list[str]]:
    """Of what was condemned, the manifests and then the rest that nobody has come to need since.

    Args:
        roots: keys of manifests as rows name them now.
        named: of every manifest that is there now and was not condemned, or is a root.
    """
    needed = _needed([key for key in named if key not in condemned or key in roots], named)
    going = [key for key in condemned if key not in needed and key not in roots]
    manifests = [key for key in going if key.startswith("manifests/")]
    return manifests, [key for key in going if not key.startswith("manifests/")]


def _needed(manifests: Iterable[str], named: Named) -> set[str]:
    return set[str]().union(*(named[key] for key in manifests))
