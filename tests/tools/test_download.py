"""Fetching the set: what arrives is whole or is refused, and every failure ends in one line.

kagglehub itself runs here, against a small server that answers as Kaggle's does.
"""

import errno
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import kagglehub
import pytest
from kagglehub.exceptions import UnauthenticatedError

from lib.data.records import DatasetNotFoundError, Triplet, write_shard
from lib.files import replacing
from tests.kaggle import Kaggle
from tools.download import CHECKSUMS, KAGGLE_COUNTS, DownloadError, download, main, verify

EXPECTED = {0: 5, 1: 5, 2: None}
NAMES = ["train00.tfrec", "train01.tfrec", "train02.tfrec"]
# Of the first shard, to make it larger than the megabyte that kagglehub writes at a time.
PICTURE = bytes(range(256)) * 400


@pytest.fixture
def kaggle(tmp_path, monkeypatch) -> Iterator[Kaggle]:
    """A server with the shards 0, 1 and 2, which kagglehub takes for Kaggle."""
    files = {}
    for name, count in zip(NAMES, (5, 5, 3), strict=True):
        picture = PICTURE if name == NAMES[0] else b"p"
        write_shard(
            tmp_path / "made" / name,
            (Triplet(b"a%d" % i + picture, picture, b"n" + picture) for i in range(count)),
        )
        files[name] = (tmp_path / "made" / name).read_bytes()
    kaggle = Kaggle(files)
    with kaggle.serving() as url:
        let_kagglehub_ask(monkeypatch, url)
        leave_out_what_is_real(tmp_path, monkeypatch)
        yield kaggle


def leave_out_what_is_real(tmp_path, monkeypatch):
    # It would look through the source of all callers for its name: slow below pytest.
    monkeypatch.setattr("kagglehub.clients.get_user_agent", lambda: "tests")
    # Nobody's real token may get into the tests.
    for variable in [name for name in os.environ if name.startswith("KAGGLE")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(tmp_path / "home"))
    for variable in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(variable, "*")


def let_kagglehub_ask(monkeypatch, url):
    monkeypatch.setattr("kagglesdk.kaggle_http_client.get_endpoint", lambda environment: url)


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "Dataset"


def failure(folder, expected=EXPECTED) -> str:
    with pytest.raises(DownloadError) as caught:
        download(folder, expected)
    message = str(caught.value)
    assert "\n" not in message
    return message


def flip(content: bytes, position: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]


# ---- what arrives


def test_the_shards_arrive_whole_and_once(kaggle, folder, monkeypatch):
    environment = dict(os.environ)
    # It emptied the environment for a moment, in which other threads found no HOME.
    monkeypatch.setattr(type(os.environ), "clear", None)
    table = download(folder, EXPECTED)
    assert list(table.index) == NAMES and list(table.columns) == ["records", "bytes", "sha256"]
    assert list(table["records"]) == [5, 5, 3]
    assert {p.name: p.read_bytes() for p in folder.glob("*.tfrec")} == kaggle.files
    assert sorted(p.name for p in folder.iterdir()) == [CHECKSUMS, *NAMES]  # and nothing else
    assert kaggle.asked == [f"{name} from 0" for name in NAMES]
    assert dict(os.environ) == environment

    kaggle.status = 500  # it must not even be asked
    assert download(folder, EXPECTED).equals(table)


def test_only_what_is_missing_is_fetched(kaggle, folder):
    download(folder, {1: 5})
    assert [p.name for p in folder.glob("*.tfrec")] == ["train01.tfrec"]
    download(folder, EXPECTED)
    assert kaggle.asked == [f"train0{number}.tfrec from 0" for number in (1, 0, 2)]


def test_an_interrupted_file_goes_on_where_it_stopped(kaggle, folder):
    kaggle.hang_up_after = 1_200_000
    assert re.search("no connection to Kaggle, or it broke .*1200000 bytes read", failure(folder))
    assert not list(folder.glob("*.tfrec"))
    kaggle.hang_up_after = None
    download(folder, EXPECTED)
    assert kaggle.asked[2] == f"train00.tfrec from {2**20}"
    assert (folder / NAMES[0]).read_bytes() == kaggle.files[NAMES[0]]


def test_what_a_killed_download_left_is_removed(kaggle, folder):
    """It was left for ever: maybe a whole shard."""
    folder.mkdir()
    (folder / f".part-00000000-{NAMES[0]}").touch()
    (folder / f".part-00000000-{NAMES[0]}.lock").touch()
    with replacing(folder / "train90.tfrec") as part:  # somebody else's, who still writes it
        download(folder, {1: 5})
        assert part.is_file() and len(list(folder.glob(".part-*"))) == 2  # with its lock


def test_on_kaggle_and_colab_it_downloads_too(kaggle, folder, monkeypatch):
    """There kagglehub would mount the set elsewhere, read-only, for all its arguments."""
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    monkeypatch.setenv("KAGGLE_DATA_PROXY_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("TBE_RUNTIME_ADDR", "127.0.0.1:9")
    assert len(download(folder, EXPECTED)) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: flip(c, -5), r"1 damaged of 5 records, first record 4 .*: damaged message"),
        (lambda c: flip(c, 0), r"1 damaged of 5 records, first record 0 .*: damaged length"),
        (lambda c: c[:-9], r"1 damaged of 5 records, first record 4 .*: cut off"),
        (lambda c: c[: len(c) // 5 * 4], "holds 4 records instead of 5"),
        (lambda c: b"", "holds 0 records instead of 5"),
        (lambda c: b"<html>sign in</html>", "1 damaged of 1 records"),
    ],
)
def test_a_shard_that_is_not_whole_gets_no_place(kaggle, folder, change, message):
    good = kaggle.files[NAMES[1]]
    kaggle.files[NAMES[1]] = change(good)
    assert re.search(f"^train01.tfrec came, but .*{message}", failure(folder))
    assert [p.name for p in folder.glob("*.tfrec")] == ["train00.tfrec"]  # came before it
    kaggle.files[NAMES[1]] = good
    assert len(download(folder, EXPECTED)) == 3  # it is asked for anew


def test_the_last_shard_may_hold_any_number_but_none(kaggle, folder):
    kaggle.files[NAMES[2]] = b""
    assert "train02.tfrec came, but holds 0 records instead of at least 1" in failure(folder)


def test_files_that_are_there_are_never_replaced(kaggle, folder):
    write_shard(folder / NAMES[0], [Triplet(b"my", b"own", b"one")])
    mine = (folder / NAMES[0]).read_bytes()
    assert "train00.tfrec holds 1 records instead of 5" in failure(folder)
    assert (folder / NAMES[0]).read_bytes() == mine


# ---- failures


def test_no_network(kaggle, folder, monkeypatch):
    let_kagglehub_ask(monkeypatch, "http://kaggle.invalid")
    assert re.match("no connection to Kaggle.*check the network", failure(folder))
    let_kagglehub_ask(monkeypatch, "http://127.0.0.1:9")  # nobody listens
    assert re.match("no connection to Kaggle.*refused.*check the network", failure(folder))


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, r"credentials.*\(401\).*kaggle\.com/settings.*KAGGLE_API_TOKEN.*kaggle\.json"),
        (403, r"refuses train00.*accept the terms.*kaggle\.com/settings"),
        (404, r"no train00\.tfrec"),
        (429, r"answered 429.*try again later"),
        (500, r"answered 500.*try again later"),
    ],
)
def test_answers_that_are_no_files(kaggle, folder, status, message):
    kaggle.status = status
    assert re.search(message, failure(folder))


def test_fewer_files_than_expected(kaggle, folder):
    del kaggle.files[NAMES[1]]
    assert "Kaggle has no train01.tfrec (404" in failure(folder)


def test_a_transfer_with_a_wrong_md5(kaggle, folder):
    kaggle.md5 = "AAAAAAAAAAAAAAAAAAAAAA=="
    assert "train00.tfrec was damaged on its way" in failure(folder)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (UnauthenticatedError(), "no valid credentials.*KAGGLE_API_TOKEN"),
        (OSError(errno.ENOSPC, "No space left"), r"disk of .* is full \(.* GB free; .* 5 GB\)"),
        (PermissionError(errno.EACCES, "Permission denied"), "train00.*PermissionError.*denied"),
        (KeyError("surprise"), "train00.tfrec could not be fetched .KeyError: 'surprise'"),
        (RuntimeError("two\n\nlines"), "could not be fetched .RuntimeError: two lines"),
        (RuntimeError(), "train00.tfrec could not be fetched .RuntimeError"),
    ],
)
def test_other_failures(kaggle, folder, monkeypatch, error, message):
    def fail(*_):
        raise error

    monkeypatch.setattr(kagglehub, "dataset_download", fail)
    assert re.search(message, failure(folder))


def test_a_broken_token_file_is_named(kaggle, folder, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "kaggle.json").write_text("{")
    assert re.search(r"no valid credentials.*kaggle\.json\): make an API token", failure(folder))


# ---- verify


@pytest.fixture
def fetched(kaggle, folder) -> Path:
    download(folder, EXPECTED)
    return folder


def test_the_checksums_suit_sha256sum(fetched):
    if not shutil.which("sha256sum"):
        pytest.skip("no sha256sum here")
    command = ["sha256sum", "--strict", "-c", CHECKSUMS]
    done = subprocess.run(command, cwd=fetched, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines() == [f"{name}: OK" for name in NAMES]


def test_a_flipped_byte_is_found_with_shard_and_record(fetched):
    shard = fetched / NAMES[0]
    shard.write_bytes(flip(shard.read_bytes(), 700_000))
    with pytest.raises(DownloadError, match=r"train00\.tfrec has 1 damaged of 5 .* record 2 "):
        verify(fetched, EXPECTED)


def test_a_shard_that_changed_is_found_though_it_is_whole(fetched):
    write_shard(fetched / NAMES[1], [Triplet(b"b", b"c", b"d")] * 5)
    with pytest.raises(DownloadError, match=r"train01.tfrec is not the file it was.*SHA256SUMS"):
        verify(fetched, EXPECTED)
    (fetched / CHECKSUMS).unlink()
    verify(fetched, EXPECTED)
    assert (fetched / CHECKSUMS).exists()  # remembers the new one


def test_a_refetched_shard_must_be_what_it_was(kaggle, fetched, tmp_path):
    (fetched / NAMES[1]).unlink()
    write_shard(tmp_path / "other", [Triplet(b"b", b"c", b"d")] * 5)
    kaggle.files[NAMES[1]] = (tmp_path / "other").read_bytes()
    assert "train01.tfrec came, but is not the file it was" in failure(fetched)


def test_all_that_is_wrong_is_named(fetched):
    for name in NAMES[:2]:
        (fetched / name).write_bytes((fetched / name).read_bytes()[:-1])
    with pytest.raises(DownloadError, match=r"train00.*cut off.*train01.*cut off"):
        verify(fetched, EXPECTED)


def test_a_missing_shard_is_named(fetched):
    (fetched / NAMES[1]).unlink()
    with pytest.raises(DatasetNotFoundError, match=r"lacks train01\.tfrec"):
        verify(fetched, EXPECTED)
    assert list(verify(fetched, None)["records"]) == [5, 3]  # whatever is there


def test_a_folder_that_can_not_be_written_to_is_verified(fetched, monkeypatch):
    (fetched / CHECKSUMS).unlink()

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    assert len(verify(fetched, EXPECTED)) == 3


# ---- command line


def test_counts_of_the_real_set():
    assert list(KAGGLE_COUNTS) == list(range(16))
    assert set(list(KAGGLE_COUNTS.values())[:15]) == {10_841} and KAGGLE_COUNTS[15] is None


def test_command_line(kaggle, folder, monkeypatch, capsys):
    monkeypatch.setattr("tools.download.KAGGLE_COUNTS", EXPECTED)
    assert main(["--dataset-dir", str(folder)]) == 0
    assert "13 records" in capsys.readouterr().out
    assert main(["--dataset-dir", str(folder), "--verify"]) == 0
    (folder / NAMES[2]).write_bytes(b"")
    capsys.readouterr()
    assert main(["--dataset-dir", str(folder), "--verify"]) == 1
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and "train02.tfrec holds 0 records" in err


def test_some_shards_alone_are_fetched(kaggle, folder, monkeypatch, capsys):
    """One shard is enough to learn with; the others are not asked for, nor missed."""
    monkeypatch.setattr("tools.download.KAGGLE_COUNTS", EXPECTED)
    arguments = ["--dataset-dir", str(folder), "--shards", "1"]
    assert main(arguments) == 0 == main([*arguments, "--verify"])
    assert "5 records" in capsys.readouterr().out
    assert [path.name for path in folder.glob("*.tfrec")] == [NAMES[1]]
    assert kaggle.asked == [f"{NAMES[1]} from 0"]
    with pytest.raises(SystemExit):
        main(["--shards", "3"])
    assert "argument --shards" in capsys.readouterr().err


def test_an_interruption_is_no_traceback(folder, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("tools.download.download", interrupt)
    assert main(["--dataset-dir", str(folder)]) == 130
    assert capsys.readouterr().err.startswith("interrupted: run this again")


@pytest.mark.parametrize("argument", ["--verify", None])
def test_command_line_fails_in_one_line(tmp_path, argument):
    """As a process of its own, without a network: nothing listens where the proxy should be."""
    command = [sys.executable, "-m", "tools.download", "--dataset-dir", str(tmp_path / "none")]
    proxies = {"https_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9"}
    environment = os.environ | proxies | {"no_proxy": "", "NO_PROXY": "", "HOME": str(tmp_path)}
    done = subprocess.run(
        [*command, *([argument] if argument else [])],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
        cwd=Path(__file__).parent,
    )
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.count("\n") == 1
    assert ("no train*.tfrec" if argument else "no connection to Kaggle") in done.stderr
