"""Files that another user could change or replace are refused."""

import os
from types import SimpleNamespace

import pytest

from holdfast.core.errors import TargetError
from holdfast.runs.store import files
from holdfast.runs.store.files import refuse_shared

pytestmark = pytest.mark.skipif(os.name == "nt", reason="permissions are no modes")
as_root = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files away"
)


@pytest.fixture
def file(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o755)
    path = folder / "file"
    path.write_text("x")
    path.chmod(0o644)
    return path


def private(monkeypatch, name="a", members=(), primary=7, others=()):
    """The group of every file has this name and these members, and is the primary group of the owner `a` and of
    `others`.
    """
    own = os.getegid()
    users = [SimpleNamespace(pw_name=user, pw_gid=own) for user in ("a", *others)]
    users.append(SimpleNamespace(pw_name="c", pw_gid=12345))
    databases = {
        "grp.getgrgid": lambda gid: SimpleNamespace(gr_name=name, gr_mem=list(members)),
        "pwd.getpwuid": lambda uid: SimpleNamespace(pw_name="a", pw_gid=own if primary == 7 else primary),
        "pwd.getpwall": lambda: users,
    }
    for function, answer in databases.items():
        monkeypatch.setattr(function, answer)


def test_files_and_folders_of_the_user_are_accepted_also_through_links(file, tmp_path):
    (tmp_path / "link").symlink_to(file.parent)
    (file.parent / "second").symlink_to("../folder/file")
    for path in (file, file.parent, tmp_path / "link" / "file", tmp_path / "link" / "second"):
        refuse_shared(path)


@pytest.mark.parametrize("mode", [0o777, 0o772, 0o1777])
def test_a_folder_that_others_may_write_to_is_refused(mode, file):
    file.parent.chmod(mode)
    with pytest.raises(TargetError, match=f"has the mode {mode:04o}, .*chmod go-w"):
        refuse_shared(file)


def test_a_folder_with_the_sticky_bit_may_be_on_the_way(file, tmp_path):
    tmp_path.chmod(0o1777)
    refuse_shared(file)
    with pytest.raises(TargetError, match="1777"):
        refuse_shared(file.parent)
    tmp_path.chmod(0o777)
    with pytest.raises(TargetError, match=f"{tmp_path.name}', which is in the path of"):
        refuse_shared(file)


def test_a_file_that_others_may_write_to_is_refused_also_through_a_link(file, tmp_path):
    file.chmod(0o646)
    (tmp_path / "link").symlink_to(file)
    for path in (file, tmp_path / "link"):
        with pytest.raises(TargetError, match="has the mode 0646"):
            refuse_shared(path)


@pytest.mark.parametrize(
    ("group", "accepted"),
    [
        ({}, True),
        ({"members": ["a"]}, True),
        ({"members": ["b"]}, False),
        ({"others": ["b"]}, False),
        ({"name": "users"}, False),
        ({"primary": 12345}, False),
    ],
)
def test_a_group_may_write_if_the_owner_is_its_only_member(group, accepted, file, monkeypatch):
    private(monkeypatch, **group)
    file.chmod(0o664)
    file.parent.chmod(0o775)
    if accepted:
        refuse_shared(file)
        monkeypatch.setattr(files, "_has_list", lambda place: True)
    with pytest.raises(TargetError, match="other users could change"):
        refuse_shared(file)


@as_root
def test_files_folders_and_links_of_another_user_are_refused(file, tmp_path):
    (tmp_path / "link").symlink_to(file)
    for place in (file, file.parent):
        os.chown(place, 12345, -1)
        with pytest.raises(TargetError, match="belongs to the user 12345"):
            refuse_shared(file)
        os.chown(place, os.geteuid(), -1)
    os.chown(tmp_path / "link", 12345, -1, follow_symlinks=False)
    refuse_shared(file)
    with pytest.raises(TargetError, match="link' belongs to the user 12345"):
        refuse_shared(tmp_path / "link")


def test_pipes_loops_and_absent_files_are_refused(file, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for name, reason in (("pipe", "a pipe or a device"), ("loop", "40 links"), ("absent", "No such file")):
        with pytest.raises(TargetError, match=reason):
            refuse_shared(tmp_path / name)
