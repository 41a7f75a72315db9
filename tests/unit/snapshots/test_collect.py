"""The collector's own rules: what a plan takes, whom a sweep waits for, and what it does without space."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.snapshots.collecting import Scene
from tests.unit.snapshots.making import tiny_disk_at

from torpor.core.errors import Conflict, MachineUnfit
from torpor.snapshots.backend import Entry, LocalDirectory
from torpor.snapshots.collect import Collector, Root
from torpor.snapshots.condemned import read_condemned
from torpor.snapshots.garbage import Listing, plan_sweep, staying, still_garbage

HOUR = 3600 * 10**9
NOW = 1000 * HOUR


class NoRows:
    """A database without a checkpoint."""

    def __init__(self) -> None:
        self.syncs = 0

    def manifests(self) -> dict[str, Root]:
        return {}

    def sync(self) -> None:
        self.syncs += 1


@st.composite
def stores(draw: st.DrawFn) -> tuple[Listing, set[str], dict[str, frozenset[str]]]:
    """A listing, the roots, and what every manifest names, of which some may be gone."""
    ages = st.sampled_from([0, 1, 2, 3])
    packs = [f"packs/{number:02}" for number in range(draw(st.integers(0, 8)))]
    manifests = [f"manifests/snp_{number:02}" for number in range(draw(st.integers(0, 8)))]
    named = {key: frozenset(draw(st.sets(st.sampled_from(packs)))) if packs else frozenset() for key in manifests}
    listed = [Entry(key, 10, NOW - draw(ages) * HOUR) for key in [*packs, *manifests, "probes/x", "owners/key_x"]]
    roots = draw(st.sets(st.sampled_from(manifests))) if manifests else set[str]()
    return Listing.of(listed, NOW), roots, named


@given(stores(), st.sampled_from([0.0, 3600.0, 2 * 3600.0]))
def test_a_plan_takes_what_is_old_and_needed_by_nothing_that_stays(store, grace_seconds) -> None:
    listing, roots, named = store
    plan = plan_sweep(listing, roots, named, grace_seconds)
    stays = staying(listing, roots, grace_seconds)
    going = {entry.key for entry in plan.entries}
    assert not going & roots
    assert not going & set().union(*(named[key] for key in stays))
    assert not going & {"owners/key_x"}
    for entry in (*listing.manifests.values(), *listing.packs.values()):
        is_old = NOW - entry.written_ns >= grace_seconds * 1e9
        is_needed = entry.key in stays or any(entry.key in named[key] for key in stays)
        assert (entry.key in going) == (is_old and not is_needed)
    order = [entry.key.partition("/")[0] for entry in plan.entries]
    assert order == sorted(order)


@given(stores(), st.data())
def test_of_what_is_condemned_nothing_goes_that_somebody_has_come_to_need(store, data) -> None:
    """Rows that appeared since name condemned manifests too, and manifests that appeared name condemned packs."""
    listing, roots, named = store
    everything = sorted([*listing.manifests, *listing.packs])
    condemned = data.draw(st.sets(st.sampled_from(everything))) if everything else set()
    manifests, others = still_garbage(sorted(condemned), roots, named)
    stays = {key for key in named if key not in condemned or key in roots}
    needed = stays | set().union(*(named[key] for key in stays))
    assert {*manifests, *others} == condemned - needed
    assert all(key.startswith("manifests/") for key in manifests)


@pytest.fixture
def scene() -> Iterator[Scene]:
    """A store with one snapshot that no row names."""
    made = Scene()
    made.run(made.save("a", 0, length=2))
    made.rows.clear()
    yield made
    made.close()


def collect(backend: LocalDirectory, rows: NoRows, *, wait_seconds: float = 0.05) -> None:
    with backend.leases.hold_alone() as alone:
        collector = Collector(backend, rows, alone, grace_seconds=0, wait_seconds=wait_seconds)
        collector.sweep()
        collector.condemn(collector.plan())
        collector.sweep()


def test_a_collector_waits_for_who_is_under_way_and_the_next_one_goes_on_with_its_list(scene: Scene) -> None:
    before = set(scene.real.list(""))
    rows = NoRows()
    with scene.real.leases.hold():
        with pytest.raises(Conflict) as refused:
            collect(scene.real, rows)
        assert refused.value.code == "collect_waited"
        assert set(scene.real.list("")) - before == {"condemned/objects"}
        with pytest.raises(Conflict):
            collect(scene.real, rows)
    condemned = read_condemned(scene.real)
    assert condemned == before
    collect(scene.real, rows)
    assert scene.real.list("") == []


def test_rows_are_synced_before_anything_is_deleted(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut must not bring back a row whose snapshot is gone."""
    rows, synced = NoRows(), list[int]()
    real = scene.real.delete_many
    monkeypatch.setattr(scene.real, "delete_many", lambda keys: (synced.append(rows.syncs), real(keys))[1])
    collect(scene.real, rows)
    assert synced
    assert min(synced) > 0


def test_a_store_whose_listings_are_behind_is_given_time_before_leases_are_looked_for(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    leases = scene.real.leases
    held = leases.held
    monkeypatch.setattr(leases, "settle", lambda: order.append(f"settle {len(read_condemned(scene.real)) > 0}"))
    monkeypatch.setattr(leases, "held", lambda: (order.append("look"), held())[1])
    collect(scene.real, NoRows())
    assert order == ["settle True", "look"]


def test_what_is_listed_late_and_gone_is_no_problem(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    late = scene.real.entries("")
    collect(scene.real, NoRows())
    real = scene.real.entries
    with monkeypatch.context() as patched:
        patched.setattr(scene.real, "entries", lambda prefix: late if prefix == "" else real(prefix))
        collect(scene.real, NoRows())
        with scene.real.leases.hold_alone() as alone:
            plan = Collector(scene.real, NoRows(), alone, grace_seconds=3600).plan()  # its manifest counts as young
            assert plan.entries == []
    assert scene.real.list("") == []


def test_on_a_full_disk_as_much_is_condemned_as_there_is_room_for(tmp_path: Path) -> None:
    with tiny_disk_at(tmp_path / "tiny") as disk:
        backend = LocalDirectory(disk / "store", spare_bytes=100_000_000)
        backend._spare_bytes = 0
        for number in range(150):
            name = hashlib.sha256(b"%d" % number).hexdigest()
            backend.put(f"packs/{name}", b"x")
        backend._spare_bytes = 100_000_000
        with (disk / "filler").open("wb", buffering=0) as filler, pytest.raises(OSError, match="No space"):
            while True:
                filler.write(bytes(4096))
        with pytest.raises(MachineUnfit):
            backend.put("packs/more", b"x")
        with (disk / "filler").open("r+b") as filler:
            filler.truncate((disk / "filler").stat().st_size - 8192)  # the list has 10,500 bytes
        left = [len(backend.list("packs/"))]
        while left[-1]:
            collect(backend, NoRows())
            left.append(len(backend.list("packs/")))
            assert left[-1] < left[-2]
        assert len(left) > 2
