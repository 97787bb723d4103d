"""Each program ends in one line on stderr that names the file or parameter, whatever is wrong."""

import errno
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from lib.files import naming, project_root, replacing
from lib.programs import UsageError, explain, program

ROOT = project_root()
PAGE, CATALOGUE = "lib.app.page", "lib.data.catalogue"
CONVERT, DOWNLOAD, MODULES = "tools.convert", "tools.download", "tools.modules"
DUPLICATES, SEARCH = "tools.duplicates", "tools.search"
PIPELINE, REPORT = "tools.pipeline", "tools.report"
BROKEN, BYTES = "a\nb\x1b[31m", os.fsdecode(b"\xff\xfe")
LONG = "n" * 300


@pytest.fixture
def at(tmp_path):
    """A folder with what people hand over by mistake; ``at`` completes the paths of arguments."""
    (tmp_path / "file").write_text("neither a folder nor anything that is expected")
    (tmp_path / "empty").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    for name in ("run", "engine"):
        (tmp_path / name).mkdir()
    (tmp_path / "engine" / "tower.engine").write_bytes(b"damaged")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.keras").write_bytes(b"damaged")
    (tmp_path / "shard").mkdir()
    (tmp_path / "shard" / "train00.tfrec").mkdir()
    (tmp_path / "latin.md").write_bytes(b"\xff\xfe")
    (tmp_path / "tiny.mp4").write_bytes(bytes(30))
    profiles = {
        "sise": "batch_sise: 8",
        "word": "batch_size: many",
        "power": "validation_share: 1e-3",
        "yes": "demo: 1",
        "list": "seeds: 3",
    }
    for name, text in profiles.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    return lambda argument: argument.replace("@", f"{tmp_path}/")


def failure(name, arguments, capsys):
    """Run a program in this process; its status and the only line that it prints."""
    try:
        status = importlib.import_module(name).main(arguments)
    except SystemExit as end:  # argparse's; the lines before the last one are the usage
        assert end.code == 2
        return 2, capsys.readouterr().err.splitlines()[-1]
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and "Traceback" not in printed.err, printed.err
    assert printed.err[:-1].isprintable() and len(printed.err) < 1100, printed.err
    return status, printed.err


@pytest.mark.parametrize(
    ("name", "arguments", "status", "named"),
    [
        *((CONVERT, [f"@{x}", "@out"], 1, x) for x in ("none", "empty", "file", "loop", LONG)),
        (CONVERT, [f"@{BROKEN}", "@out"], 1, "a\\nb\\x1b"),
        (CONVERT, [f"@{BYTES}", "@out"], 1, "\\udcff"),
        (CONVERT, ["@empty", "@out", "--labels", "@none"], 1, "none"),
        (CONVERT, ["@empty", "@out", "--labels", "@empty"], 1, "empty"),
        (CONVERT, ["@empty", "@out", "--labels", "@latin.md"], 1, "latin.md"),
        (CONVERT, ["@empty", "@out", "--labels", "@file"], 1, "file"),
        (CONVERT, ["@empty", "@out", "--size", "-1"], 2, "size=-1"),
        (CONVERT, ["@empty", "@out", "--quality", "101"], 2, "quality=101"),
        (CONVERT, ["@empty", "@out", "--seed", "-1"], 2, "seed=-1"),
        (CONVERT, ["@empty", "@out", "--records-per-shard", "0"], 2, "records_per_shard=0"),
        (CONVERT, ["@empty", "@out", "--size", "big"], 2, "--size"),
        (CONVERT, ["@empty"], 2, "target"),
        # An unset variable of a shell script; the working directory was converted.
        (CONVERT, ["", "@out"], 2, "argument photos: the path is empty"),
        (CONVERT, ["@empty", ""], 2, "argument target"),
        (CONVERT, ["@empty", "@out", "--labels", ""], 2, "argument --labels"),
        (CATALOGUE, [""], 2, "argument dataset_dir"),
        (DOWNLOAD, ["--dataset-dir", ""], 2, "argument --dataset-dir"),
        (MODULES, ["--write", ""], 2, "argument --write"),
        (REPORT, [""], 2, "argument run"),
        (PIPELINE, [""], 2, "argument profile"),
        (PAGE, ["--run-dir", ""], 2, "argument --run-dir"),
        (PAGE, ["--gallery", ""], 2, "argument --gallery"),
        (CATALOGUE, ["@none"], 1, "none"),
        (CATALOGUE, ["@file"], 1, "file"),
        (CATALOGUE, ["@shard"], 1, "train00.tfrec"),
        (DOWNLOAD, ["--dataset-dir", "@file"], 1, "file"),
        (DOWNLOAD, ["--dataset-dir", "@file/deeper"], 1, "file"),
        (DOWNLOAD, ["--dataset-dir", "@loop"], 1, "loop"),
        (DOWNLOAD, ["--dataset-dir", f"@{LONG}"], 1, LONG),
        (DOWNLOAD, ["--verify", "--dataset-dir", "@none"], 1, "none"),
        (DOWNLOAD, ["--verify", "--dataset-dir", f"@{BROKEN}"], 1, "a\\nb\\x1b"),
        (DOWNLOAD, ["--verify", "--dataset-dir", "@empty"], 1, "empty"),
        (DOWNLOAD, ["--verify", "--dataset-dir", "@file"], 1, "file"),
        (DOWNLOAD, ["--fast"], 2, "--fast"),
        *((DUPLICATES, [f"@{x}"], 1, x) for x in ("none", "empty", "file", "loop", LONG)),
        (DUPLICATES, [f"@{BROKEN}"], 1, "a\\nb\\x1b"),
        (DUPLICATES, [f"@{BYTES}"], 1, "\\udcff"),
        (DUPLICATES, [], 2, "PHOTOS"),
        (DUPLICATES, ["@empty", "--out", ""], 2, "argument --out"),
        *((SEARCH, [f"@{x}", "@file"], 1, x) for x in ("none", "file", "loop", LONG)),
        (SEARCH, [f"@{BROKEN}", "@file"], 1, "a\\nb\\x1b"),
        (SEARCH, ["@empty"], 2, "QUERY"),
        (SEARCH, ["", "@file"], 2, "argument PHOTOS"),
        (SEARCH, ["@empty", ""], 2, "argument QUERY"),
        (SEARCH, ["@empty", "@file", "--k", "0"], 2, "--k 0"),
        *(
            (SEARCH, ["@empty", "@file", "--box", box], 2, "--box")
            for box in ("1,2,3", "a,b,c,d", "5,5,5,9", "nan,0,9,9", "0,0,inf,9", "9,9,1,1")
        ),
        (SEARCH, ["@empty", "@file", "@file", "--box", "1,2,3,4"], 2, "--box"),
        (SEARCH, ["@empty", "@file", "--run-dir", "@run"], 1, "run"),
        (SEARCH, ["@empty", "@file", "--run-dir", "@engine"], 1, "tower.engine"),
        *((PAGE, ["--photos", f"@{x}"], 1, x) for x in ("none", "file", "loop", LONG)),
        (PAGE, ["--photos", ""], 2, "argument --photos"),
        *((MODULES, ["--write", f"@{x}"], 1, x) for x in ("none", "empty", "file", "latin.md")),
        (MODULES, ["--write", f"@{LONG}"], 1, LONG),
        (MODULES, ["--write", f"@{BYTES}"], 1, "\\udcff"),
        *((REPORT, [f"@{x}"], 1, x) for x in ("none", "file", "loop", LONG)),
        (REPORT, [f"@{BROKEN}"], 1, "a\\nb\\x1b"),
        (REPORT, ["@run", "@more"], 2, "more"),
        *((PIPELINE, [f"@{x}"], 2, x) for x in ("none", "empty", "file", "loop", LONG)),
        (PIPELINE, [f"@{BROKEN}"], 2, "a\\nb\\x1b"),
        (PIPELINE, [f"@{BYTES}"], 2, "\\udcff"),
        (PIPELINE, ["@sise.yaml"], 2, "batch_sise"),
        (PIPELINE, ["@word.yaml"], 2, "batch_size must be of type int"),
        (PIPELINE, ["@power.yaml"], 2, "validation_share must be of type float, such as 1.0e-3"),
        (PIPELINE, ["@yes.yaml"], 2, "demo must be of type bool"),
        (PIPELINE, ["@list.yaml"], 2, "seeds must be of type list"),
        (PIPELINE, ["--run-dir", "@file"], 1, "file"),
        (PIPELINE, ["--run-dir", "@file/deeper"], 1, "file"),
        (PIPELINE, ["--run-dir", "@loop"], 1, "loop"),
        *((PAGE, ["--run-dir", f"@{x}"], 1, x) for x in ("none", "run", "file", LONG)),
        (PAGE, ["--run-dir", "@engine"], 1, "tower.engine"),
        (PAGE, ["--run-dir", "@loop"], 1, "loop"),
        (PAGE, ["--run-dir", f"@{BROKEN}"], 1, "a\\nb\\x1b"),
        (PAGE, ["--port", "0"], 2, "--port 0"),
        (PAGE, ["--port", "-1"], 2, "--port -1"),
        (PAGE, ["--port", "70000"], 2, "--port 70000"),
        (PAGE, ["--port", "http"], 2, "--port"),
    ],
    ids=lambda value: str(value)[:40].encode("ascii", "replace").decode() or None,
)
def test_what_a_person_can_do_wrong(at, capsys, name, arguments, status, named):
    found, line = failure(name, [*map(at, arguments)], capsys)
    assert found == status and named in line, line


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--gallery", "@none"], "none (--gallery)"),
        (["--gallery", "@file"], "file (--gallery)"),
        (["--gallery", "@empty"], "empty (--gallery)"),
        (["--gallery", f"@{BROKEN}"], "a\\nb\\x1b"),
        (["--gallery", f"@{LONG}"], LONG),
        (["--gallery", "@empty", "--folders-root", "@none"], "none (--folders-root)"),
    ],
)
def test_folders_of_the_page(at, monkeypatch, capsys, arguments, named):
    monkeypatch.setattr(f"{PAGE}.open_engine", lambda run: None)
    status, line = failure(PAGE, [*map(at, arguments)], capsys)
    assert status == 1 and line.startswith("app: ") and named in line


def test_a_damaged_model_is_named(at, capsys):
    assert importlib.import_module(PAGE).main(["--run-dir", at("@model")]) == 1
    first, line = capsys.readouterr().err.splitlines()
    assert "exporting" in first and "model.keras is not a saved tower" in line


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        (CONVERT, ["none", "out"]),
        (DOWNLOAD, ["--verify", "--dataset-dir", "none"]),
        (DUPLICATES, ["none"]),
        (MODULES, ["--write", "none"]),
        (PAGE, ["--run-dir", "none"]),
        (PIPELINE, ["none"]),
        (REPORT, ["none"]),
    ],
)
@pytest.mark.parametrize("where", ["outside", "deleted"])
def test_outside_the_project(tmp_path, monkeypatch, capsys, name, arguments, where):
    """Three of them called project_root() outside of their try."""
    importlib.import_module(name)  # some libraries look at the working directory
    folder = tmp_path / "folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    if where == "deleted":
        folder.rmdir()
    status, line = failure(name, arguments, capsys)
    assert status in (1, 2) and ("none" in line or "working directory was deleted" in line)


WRITERS = [
    (MODULES, ["--write", "@page.md"], "page.md"),
    (REPORT, ["@run"], "report.html"),
    (PIPELINE, ["--run-dir", "@run"], "run"),
    (CONVERT, ["@photos", "@out", "--size", "8"], "out"),
]


@pytest.mark.parametrize(("name", "arguments", "named"), WRITERS)
@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EROFS])
def test_a_full_or_read_only_disk(at, monkeypatch, capsys, name, arguments, named, fault):
    for landmark in "ab":
        folder = at(f"@photos/{landmark}")
        os.makedirs(folder)
        for number in range(2):
            Image.new("RGB", (9, 9), (number, 0, ord(landmark))).save(f"{folder}/{number}.png")
    Path(at("@page.md")).write_text("<!-- modules -->\n<!-- /modules -->")
    importlib.import_module(name)
    if fault == errno.ENOSPC:

        def fsync(file):
            raise OSError(fault, os.strerror(fault))  # as of a write: it names no file

        monkeypatch.setattr(os, "fsync", fsync)
    else:
        whole = os.open

        def refuse(path, flags, *arguments, **keywords):
            if flags & os.O_CREAT and str(path).startswith(at("@")):
                raise OSError(fault, os.strerror(fault), path)
            return whole(path, flags, *arguments, **keywords)

        monkeypatch.setattr(os, "open", refuse)
    status, line = failure(name, [*map(at, arguments)], capsys)
    assert status == 1 and named in line and os.strerror(fault) in line
    assert ("make room" if fault == errno.ENOSPC else "choose another") in line


@pytest.mark.parametrize(
    ("name", "function", "arguments"),
    [
        (CONVERT, "read_folder", ["photos", "out"]),
        (CATALOGUE, "open_catalogue", ["shards"]),
        (DOWNLOAD, "download", []),
        (DUPLICATES, "find_photos", ["photos"]),
        (MODULES, "table", []),
        (REPORT, "write_report", []),
        (PIPELINE, "read_profile", ["profile"]),
        (PAGE, "open_engine", []),
    ],
)
@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), KeyError("x"), OSError()])
def test_interrupts_and_what_nobody_expects(monkeypatch, capsys, name, function, arguments, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(f"{name}.{function}", fail)
    status, line = failure(name, arguments, capsys)
    words = {KeyboardInterrupt: "interrupted: ", MemoryError: "memory is short", OSError: "OSError"}
    assert words.get(type(error), "KeyError in test_programs.py, line") in line
    assert status == (130 if isinstance(error, KeyboardInterrupt) else 1)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [(SEARCH, ["@in", "@in/a.png"]), (DUPLICATES, ["@in"]), (PAGE, ["--photos", "@in"])],
)
def test_own_photos_with_a_read_only_project(at, monkeypatch, capsys, name, arguments):
    """Nothing could be searched there: the network and the embeddings had no other place."""
    os.mkdir(at("@in"))
    Image.new("RGB", (9, 9)).save(at("@in/a.png"))
    module, kept = importlib.import_module(name), []
    monkeypatch.setenv("XDG_CACHE_HOME", at("@cache"))
    monkeypatch.setattr(module, "OWN_PHOTOS", at("@file/own_photos"))
    monkeypatch.setattr(module, "packaged_engine", lambda run: kept.append(run) or 1 / 0)
    assert module.main([*map(at, arguments)]) == 1
    assert kept == [Path(at("@cache")) / "image-retrieval-system" / "own_photos"]
    where, failed = capsys.readouterr().err.splitlines()
    assert "file/own_photos can't be written to: " in where and str(kept[0]) in where
    assert "ZeroDivisionError" in failed


def test_the_profiles_have_the_types_of_the_parameters():
    pipeline = importlib.import_module(PIPELINE)
    known = {}
    for name in pipeline.NOTEBOOKS:
        known |= pipeline.notebook_parameters(ROOT / "notebooks" / f"{name}.ipynb")
    assert known["batch_size"] == "int" and known["dataset_dir"] == "str"
    assert known["backbone"] == "str"  # a profile that named it was refused
    for path in (ROOT / "profiles").glob("*.yaml"):
        assert pipeline.read_profile(path, known) == yaml.safe_load(path.read_text())


# ---- the decorator


def test_statuses_prefix_and_result(capsys):
    errors = [UsageError("--x"), ValueError("two\nlines"), None]

    @program(prefix="x: ")
    def main(arguments=None):
        """Say nothing."""
        if error := errors.pop(0):
            raise error
        return 3

    assert main.__doc__ == "Say nothing."
    assert [main(), main(), main()] == [2, 1, 3]
    assert capsys.readouterr().err == "x: --x\nx: two lines\n"


def test_errors_of_a_full_disk_name_the_file(tmp_path):
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError) as caught, replacing(tmp_path / "x.npy"):
        raise full
    assert explain(caught.value).startswith(f"{tmp_path}/x.npy: No space left on device: make room")
    with pytest.raises(FileNotFoundError) as caught, naming(tmp_path / "x"):
        (tmp_path / "other").read_text()
    assert "other" in explain(caught.value)  # an error that names a file keeps it
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError) as caught, replacing(tmp_path / "folder"):
        pass
    assert explain(caught.value).startswith(f"{tmp_path}/folder: ")  # not its temporary name


RUN = "import sys; from lib.programs import program\n"
LATE = RUN + (
    "@program()\ndef main(a=None):\n    print('\\udcff→' + 'x' * {size})\n    return 0\n"
    "sys.exit(main())"
)


@pytest.mark.skipif(sys.platform == "win32", reason="uses pipes and devices of POSIX")
@pytest.mark.parametrize("size", [1, 100_000])
@pytest.mark.parametrize("where", ["pipe", "/dev/full", "ascii"])
def test_an_output_that_can_not_be_written(where, size):
    """It was a traceback, or status 120 after 'Exception ignored in'."""
    if where == "/dev/full" and not os.path.exists(where):
        pytest.skip("no /dev/full")
    process = subprocess.Popen(
        [sys.executable, "-c", LATE.format(size=size)],
        cwd=ROOT,
        stdout=os.open(where, os.O_WRONLY) if where == "/dev/full" else subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | ({"PYTHONIOENCODING": "ascii"} if where == "ascii" else {}),
    )
    if where == "ascii":
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0 and not err and out.startswith(b"\\udcff\\u2192x")
        return
    if where == "pipe":
        process.stdout.close()
    err = process.stderr.read().decode()
    assert process.wait(60) == 1 and err.count("\n") == 1, err
    assert ("Broken pipe" if where == "pipe" else "No space left on device: make room") in err


def test_a_developer_sees_the_traceback():
    code = RUN + "@program()\ndef main(a=None):\n    raise KeyError('x')\nsys.exit(main())"
    command = [sys.executable, "-X", "dev", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "Traceback" in done.stderr


@pytest.mark.parametrize(
    ("name", "arguments", "status"),
    [
        (REPORT, ["none"], 1),
        (CONVERT, ["none", "out"], 1),
        (CONVERT, ["none", "out", "--size", "0"], 2),
        (DOWNLOAD, ["--verify"], 1),
    ],
)
def test_as_processes(tmp_path, name, arguments, status):
    command = [sys.executable, "-m", name, *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, env=environment, timeout=60)
    assert (done.returncode, done.stderr.count(b"\n"), done.stdout) == (status, 1, b"")
