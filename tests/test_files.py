"""Files are whole or absent, locks keep others out, paths in messages never raise."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lib.files import (
    only_writer,
    or_cache,
    project_root,
    read_json,
    remove_half_written,
    replacing,
    show_error,
    show_path,
    write_json,
)


def test_project_root_is_found_from_below():
    root = project_root()
    assert (root / "environment.yml").is_file()
    assert project_root(root / "notebooks") == root
    with pytest.raises(FileNotFoundError, match=r"no environment\.yml"):
        project_root(root.parent)


def test_project_root_from_elsewhere_is_that_of_the_library(tmp_path, monkeypatch):
    """Notebooks and programs that were started in another folder stopped."""
    root = project_root()
    gone = tmp_path / "gone"
    gone.mkdir()
    for folder in (tmp_path, gone):
        monkeypatch.chdir(folder)
        if folder == gone:
            gone.rmdir()
        assert project_root() == root


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path):
    path = tmp_path / "folder" / "file.txt"
    with replacing(path) as part:
        part.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as part:
        part.write_text("half of the n")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_the_temporary_file_ends_like_the_final_one(tmp_path):
    with replacing(tmp_path / "checkpoint.weights.h5") as part:
        assert part.name.endswith("checkpoint.weights.h5")
        assert part.parent == tmp_path  # a rename is only atomic within one file system


def test_json_comes_back_and_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"λ": [1, 2.5, None]})
    assert read_json(path) == {"λ": [1, 2.5, None]}
    path.write_text('{"cut o')
    with pytest.raises(ValueError, match=r"a\.json is not valid JSON"):
        read_json(path)


def test_new_files_have_the_permissions_of_ordinary_ones_without_a_change_of_the_umask(
    tmp_path, monkeypatch
):
    # os.umask(0) was called to learn the umask: other threads' files were open to all meanwhile.
    monkeypatch.setattr("os.umask", None)
    with replacing(tmp_path / "a") as part:
        part.write_text("a")
    (tmp_path / "b").write_text("b")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


@pytest.mark.skipif(sys.platform == "win32", reason="uses links and names of POSIX")
def test_a_path_for_a_message_never_raises(tmp_path, monkeypatch):
    # It looked for environment.yml in the working directory, and raised outside of the project.
    root = project_root()
    (tmp_path / "loop").symlink_to("loop")
    gone = tmp_path / "gone"
    gone.mkdir()
    for folder in (root, root / "lib", tmp_path, gone):
        monkeypatch.chdir(folder)
        if folder == gone:
            gone.rmdir()
        assert show_path(root / "lib" / "files.py") == "lib/files.py"
        assert show_path(tmp_path / "photo.jpg") == str(tmp_path / "photo.jpg")
        assert show_path(tmp_path / "loop") == str(tmp_path / "loop")
        assert "a" in show_path(Path("a")) and show_path(Path("a\0b"))
        assert show_path(Path("/") / os.fsdecode(b"\xff.jpg")) == "/\\udcff.jpg"


WRITER = """
import os, sys
from pathlib import Path
from lib.files import replacing

with replacing(Path(sys.argv[1])) as part:
    part.write_text("half")
    print("writing", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def writer(tmp_path):
    """Another process that is half through with writing ``file``."""
    command = [sys.executable, "-c", WRITER, str(tmp_path / "file")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=project_root(), **pipes) as process:
        assert process.stdout.readline() == "writing\n"
        yield process
        process.kill()


def test_half_written_files_of_the_living_stay_and_those_of_the_dead_go(tmp_path, writer):
    # Every .part-* was removed, also one that another process was about to rename.
    (tmp_path / ".part-ray-x").mkdir()  # a folder is nobody's half-written file
    (tmp_path / ".part-abc-old").write_text("left by a version without locks")
    with replacing(tmp_path / "sub" / "mine") as part:
        part.write_text("mine")
        for _ in range(2):  # the first left the files, but took their locks, so the second did not
            remove_half_written(tmp_path, subfolders=True)
    assert (tmp_path / "sub" / "mine").read_text() == "mine"
    writer.communicate("\n", timeout=20)
    assert writer.returncode == 0 and (tmp_path / "file").read_text() == "half"
    assert sorted(p.name for p in tmp_path.iterdir()) == [".part-ray-x", "file", "sub"]
    remove_half_written(tmp_path / "absent")


def test_a_folder_that_another_process_removes_meanwhile_is_passed_over(tmp_path, monkeypatch):
    left, scan = tmp_path / "z" / ".part-abc-left", os.scandir
    for folder in ("a", "z"):
        (tmp_path / folder).mkdir()
    left.touch()

    def scandir(path):
        if Path(path).name == "a":
            Path(path).rmdir()
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    remove_half_written(tmp_path, subfolders=True)
    assert not (tmp_path / "a").exists() and not left.exists()


def test_half_written_files_of_a_killed_process_are_removed(tmp_path, writer):
    writer.kill()
    writer.wait()
    assert list(tmp_path.glob(".part-*-file"))
    remove_half_written(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_lock_keeps_others_out_until_its_holder_is_done(tmp_path):
    with only_writer(tmp_path, None):
        with pytest.raises(KeyError, match="busy"), only_writer(tmp_path, KeyError("busy")):
            pass
        code = "import os, sys, pathlib, lib.files as f; folder = pathlib.Path(sys.argv[1]); "
        code += "lock = f.only_writer(folder, SystemExit(3)); lock.__enter__(); os._exit(0)"
        command = [sys.executable, "-c", code, str(tmp_path)]
        assert subprocess.run(command, cwd=project_root()).returncode == 3
    assert subprocess.run(command, cwd=project_root()).returncode == 0  # ends without letting go
    with only_writer(tmp_path, KeyError("busy")):
        pass


def test_what_a_read_only_project_can_not_keep_goes_to_the_cache(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert or_cache(tmp_path / "runs" / "kept") == tmp_path / "runs" / "kept"
    assert (tmp_path / "runs" / "kept").is_dir() and not capsys.readouterr().err
    (tmp_path / "file").touch()
    cache = tmp_path / "cache" / "image-retrieval-system" / "kept"
    assert or_cache(tmp_path / "file" / "kept") == cache and cache.is_dir()
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "file/kept can't be" in line and str(cache) in line
    # Root may write to any folder but those of a read-only disk.
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / "runs" / "kept")
    assert or_cache(tmp_path / "runs" / "kept") == cache


def test_the_message_of_an_error_is_one_short_line():
    """zipfile's quoted 10,000 letters of a damaged file."""
    assert show_error(ValueError("\n first\nsecond")) == "first"
    assert show_error(KeyError()) == "KeyError"
    assert len(show_error(ValueError("x" * 10_000))) == 500


def test_another_project_around_is_not_taken_for_this_one(tmp_path, monkeypatch):
    (tmp_path / "environment.yml").touch()
    monkeypatch.chdir(tmp_path)
    assert (project_root() / "lib" / "files.py").is_file()
