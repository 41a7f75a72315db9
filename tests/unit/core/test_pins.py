"""What is said of an image that cannot be restored here: the reason, and what to do."""

import re

import pytest

from torpor.core.pins import PinsUnmet, check_pins, kept_name

HERE = {
    "driver": "gvisor",
    "machine": "x86_64",
    "cpu_features": "aes avx avx2 sse2",
    "runsc_sha256": "ab" * 32,
    "runsc_version": "release-2",
    "flags": "--platform=systrap --directfs=false",
    "image_digest": "12" * 32,
}


def test_what_was_made_here_is_restored_here() -> None:
    check_pins("checkpoint 3", HERE, HERE)


@pytest.mark.parametrize(
    ("name", "pinned", "reason", "remedy"),
    [
        ("driver", "firecracker", "the driver firecracker made it, here is gvisor", "has that driver"),
        ("machine", "aarch64", "of a machine of kind aarch64, this one is x86_64", "of that kind"),
        ("cpu_features", "aes avx avx512f gfni sse2", "its CPU had avx512f gfni, which", "whose CPU has that"),
        ("runsc_sha256", "cd" * 32, "runsc release-2 made it", f"bin/{kept_name('cd' * 32)}/runsc"),
        (
            "flags",
            "--platform=systrap --directfs=true",
            "--directfs=true, here it runs with --directfs=false",
            "root or",
        ),
        ("image_digest", "34" * 32, "its root image is 3434343434343434, the session's is 1212121212121212", "--image"),
    ],
)
def test_each_pin_that_is_not_met_has_its_reason_and_its_remedy(
    name: str, pinned: str, reason: str, remedy: str
) -> None:
    with pytest.raises(
        PinsUnmet, match=f"^cannot restore checkpoint 3 on this machine: .*{re.escape(reason)}"
    ) as caught:
        check_pins("checkpoint 3", {**HERE, name: pinned}, HERE)
    assert caught.value.code == "pins_unmet"
    assert remedy in caught.value.hint
    assert "torpor resume --boot" in caught.value.hint


def test_another_version_of_the_same_binary_is_no_difference() -> None:
    check_pins("checkpoint 3", {**HERE, "runsc_version": "release-2+local"}, HERE)


def test_cpu_that_can_more_will_do() -> None:
    check_pins("checkpoint 3", {**HERE, "cpu_features": "aes sse2"}, HERE)


def test_what_only_one_side_knows_is_not_compared() -> None:
    check_pins("checkpoint 3", {}, HERE)
    check_pins("checkpoint 3", {**HERE, "moon": "full"}, HERE)
