"""The listing of a root image: equal where a restored sandbox finds what it had open, else it says where not."""

import os
from pathlib import Path

import pytest

from torpor.core.errors import InvalidInput
from torpor.sandbox.root_listing import first_difference, root_listing
from torpor.sandbox.rootfs import RootImage, directory_image, image_here


def nothing(_what: str, _done: int, _of: int) -> None:
    """Nobody watches."""


@pytest.fixture
def image(tmp_path: Path) -> RootImage:
    root, tools = tmp_path / "root", tmp_path / "tools"
    for directory in (root / "bin", tools / "lib/__pycache__"):
        directory.mkdir(parents=True)
    (root / "bin/sh").write_bytes(b"a shell")
    (tools / "lib/code.py").write_bytes(b"print()")
    (tools / "link").symlink_to("lib/code.py")
    return directory_image(root, [tools])


def test_listing_is_equal_when_nothing_changed_that_a_sandbox_can_have_open(image: RootImage, tmp_path: Path) -> None:
    before = root_listing(image, nothing)
    assert set(before) == {"/", str(tmp_path / "tools")}
    (tmp_path / "tools/lib/__pycache__/code.pyc").write_bytes(b"made outside")
    (tmp_path / "root/workspace").mkdir()
    (tmp_path / "root/bin/hidden").touch()
    assert first_difference(before, root_listing(image, nothing)) is None


@pytest.mark.parametrize("change", ["size", "time", "mode", "name", "link", "new"])
def test_listing_differs_at_the_mount_where_a_file_does(image: RootImage, tmp_path: Path, change: str) -> None:
    before, code = root_listing(image, nothing), tmp_path / "tools/lib/code.py"
    match change:
        case "size":
            found = code.stat()
            code.write_bytes(b"print(1)")
            os.utime(code, ns=(found.st_atime_ns, found.st_mtime_ns))
        case "time":
            os.utime(code, (1, 1))
        case "mode":
            code.chmod(0o700)
        case "name":
            code.rename(code.with_name("other.py"))
        case "link":
            (tmp_path / "tools/link").unlink()
            (tmp_path / "tools/link").symlink_to("elsewhere")
        case _:
            (tmp_path / "tools/lib/more.py").write_bytes(b"x")
    assert first_difference(before, root_listing(image, nothing)) == str(tmp_path / "tools")


def test_contents_count_in_the_host_images_own_root_and_times_do_not(image: RootImage, tmp_path: Path) -> None:
    host = RootImage(name="host", root=image.root, mounts=(), path="", digest="")
    before = root_listing(host, nothing)
    os.utime(tmp_path / "root/bin/sh", (1, 1))
    assert first_difference(before, root_listing(host, nothing)) is None
    (tmp_path / "root/bin/sh").write_bytes(b"another")
    assert first_difference(before, root_listing(host, nothing)) == "/"


def test_image_whose_mounts_are_not_here_is_refused(image: RootImage, tmp_path: Path) -> None:
    assert image_here(image, tmp_path / "images").digest == image.digest
    (tmp_path / "tools").rename(tmp_path / "gone")
    with pytest.raises(InvalidInput) as refused:
        image_here(image, tmp_path / "images")
    assert refused.value.code == "image_unusable"
