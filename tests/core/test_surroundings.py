"""Environments people really have: closed streams, odd encodings and variables, no home, no flock, dead machines."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from domainbed_sfp.core import crashes, locks, surroundings
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.data.images.cache import default_cache_dir
from domainbed_sfp.sweep.capacity import job_environment
from domainbed_sfp.sweep.launchers import slurm_task

# threads -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, expected",
    [
        (None, 2),
        ("", 2),
        ("0", 2),
        ("abc", 2),
        ("-1", 2),
        ("1.5", 2),
        ("4", 4),
        (" 3 ", 3),
        ("4,3,2", 4),
        (",2", 2),
        ("9" * 30, 2),
    ],
)
def test_a_job_has_as_many_threads_as_are_asked_for_or_its_share(monkeypatch, given, expected):
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    monkeypatch.setattr("domainbed_sfp.sweep.capacity.usable_cores", lambda: 4)
    made = job_environment(0, 2, [])
    assert surroundings.threads(made) == expected == int(made["MKL_NUM_THREADS"])
    on_slurm = slurm_task.thread_environment({**os.environ, "SLURM_CPUS_PER_TASK": "", "SLURM_CPUS_ON_NODE": "2"})
    assert surroundings.threads(on_slurm) == expected


# streams -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def stream():
    def make(encoding: str) -> io.TextIOWrapper:
        return io.TextIOWrapper(io.BytesIO(), encoding=encoding)

    return make


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "cp437", "utf-8"])
def test_what_an_encoding_lacks_is_replaced(monkeypatch, stream, encoding):
    text = "71.5 ± 0.3 † 2\u20133 \u00d7 中 \udcff"
    monkeypatch.setattr(sys, "stdout", stream(encoding))
    monkeypatch.setattr(sys, "stderr", stream(encoding))
    surroundings.prepare()
    for file in (sys.stdout, sys.stderr):
        print(text, file=file, flush=True)
        written = file.buffer.getvalue().decode(encoding)
        assert written.startswith("71.5 ") and "Traceback" not in written
        if encoding == "utf-8":
            assert written == "71.5 ± 0.3 † 2\u20133 \u00d7 中 ?\n"
        if encoding == "ascii":
            assert written == "71.5 +- 0.3 * 2-3 x ? ?\n"


@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-"])
def test_closed_streams(tmp_path, closed):
    """The files of a command get none of the streams' numbers, and it ends as always."""
    command = f"{sys.executable} -m domainbed_sfp list hparams --algorithm ERM {closed}"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert ("batch_size" in done.stdout) == (">&-" not in closed.replace("2>&-", ""))


def test_a_terminal_of_another_encoding(tmp_path):
    variables = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "cp437:strict"}
    command = [sys.executable, "-m", "domainbed_sfp", "list", "hparams", "--dataset", "PACS"]
    done = subprocess.run(command, env={**os.environ, **variables}, cwd=tmp_path, capture_output=True)
    assert done.returncode == 0 and b"batch_size" in done.stdout and not done.stderr


# folders -------------------------------------------------------------------------------------------------------------


def _no_home():
    raise RuntimeError("Could not determine home directory.")


def test_the_cache_needs_no_home_where_a_variable_says_where_it_is(monkeypatch, tmp_path):
    monkeypatch.setattr(Path, "home", _no_home)
    assert default_cache_dir() == Path(os.environ["DOMAINBED_SFP_CACHE"])
    monkeypatch.setenv("DOMAINBED_SFP_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "domainbed_sfp"
    for useless in ("", "relative/folder"):
        monkeypatch.setenv("XDG_CACHE_HOME", useless)
        with pytest.raises(UserError, match="--cache_dir, DOMAINBED_SFP_CACHE or XDG_CACHE_HOME"):
            default_cache_dir()
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    assert default_cache_dir() == tmp_path / "home" / ".cache" / "domainbed_sfp"


def test_a_user_whom_no_passwd_entry_names_gets_a_name(monkeypatch):
    monkeypatch.setattr("getpass.getuser", lambda: (_ for _ in ()).throw(KeyError("uid not found: 54321")))
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("USER", "")
    surroundings.prepare()
    assert os.environ["USER"].startswith("uid") and "XDG_CACHE_HOME" not in os.environ


def test_sockets_lie_where_their_paths_are_short_enough(monkeypatch, tmp_path):
    folder = tmp_path / ("project_465000999_scratch" * 4)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    with surroundings.sockets_folder() as found:
        assert found and len(tempfile.gettempdir()) < 60
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(tempfile.mktemp(prefix="pymp-12345678-listener-"))
            os.unlink(one.getsockname())
    assert tempfile.gettempdir() == str(folder)
    monkeypatch.setattr(surroundings, "_fits", lambda folder: False)
    with surroundings.sockets_folder() as found:
        assert not found


# locks ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def without_flock(monkeypatch):
    """No file system has flock, and says so in this way."""

    def begin(number: int = errno.ENOSYS) -> None:
        def flock(file: object, operation: int) -> None:
            raise OSError(number, "no flock here")

        monkeypatch.setattr(fcntl, "flock", flock)

    return begin


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_locks_work_without_flock(without_flock, tmp_path, number):
    without_flock(number)
    (tmp_path / "left.lock").write_text("")
    os.utime(tmp_path / "left.lock", (time.time() - 100,) * 2)
    for path in (tmp_path / "run.lock", tmp_path / "left.lock"):
        with locks.hold(path, 1, "computing"):
            assert locks.is_held(path) and locks.holder(path).process == os.getpid()
            with pytest.raises(locks.Held, match="remove the file"), locks.hold(path, 0, "computing"):
                pass
        assert not locks.is_held(path)


MARKER = "10840\nnode17\n5806659434834786635937251943674988787002289400365497531409\n"


def test_the_lock_of_a_dead_machine_names_it_and_can_be_broken(main, without_flock, tmp_path):
    without_flock()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.lock").write_text(MARKER)
    os.utime(tmp_path / "run" / "run.lock", (time.time() - 3 * 86400,) * 2)
    train = ("train", "--dataset", "ColoredDigits", "--steps", 1, "--output_dir", "run", "--skip_model_save")
    held = main(*train, check=False)
    assert held.returncode == 75 and held.stderr.count("\n") == 1
    for part in ("run/run.lock", "process 10840 on host node17", "3 days old", "--break_lock"):
        assert part in held.stderr
    broken = main(*train, "--break_lock")
    assert "removed the lock" in broken.stderr and "node17" in broken.stderr
    assert (tmp_path / "run" / "done").exists()


def test_the_lock_of_a_living_process_is_not_broken(tmp_path):
    path = tmp_path / "run.lock"
    code = "import sys,time; from pathlib import Path; from domainbed_sfp.core import locks\nwith locks.hold(Path(sys.argv[1]), 1, 'x'): print(1, flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        path.write_text(MARKER)  # what a file system without flock has left in the same file
        with pytest.raises(locks.Held, match="living process"):
            locks.break_lock(path)
        with (
            pytest.raises(locks.Held, match="another process is computing this run"),
            locks.hold(path, 0, "computing this run"),
        ):
            pass
        process.kill()
    assert locks.break_lock(path) is None and path.exists() and not locks.is_held(path)


@pytest.mark.parametrize(
    "text", ["", "x", "12", "12\n", "\n\n", "-1\nhost", "12\nho\x1b[31mst\n", "9" * 40 + "\nhost", "\udcff"]
)
def test_any_file_of_a_lock_can_be_told(tmp_path, text):
    path = tmp_path / "run.lock"
    path.write_bytes(text.encode(errors="surrogateescape"))
    assert locks.holder(path).describe().isprintable()


# the last net --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error, parts",
    [
        (
            ValueError("odd\nthing"),
            ("domainbed-sfp train: ValueError: odd thing (test_surroundings.py, line", "please report it"),
        ),
        (MemoryError(), ("out of memory", "batch_size")),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), ("out of memory", "--jobs")),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), ("out of memory",)),
        (OSError(28, "No space left on device", "x/y"), ("No space left on device (x/y)", "make room")),
        (BrokenPipeError(32, "Broken pipe"), ("BrokenPipeError",)),
        (RecursionError("maximum recursion depth exceeded"), ("RecursionError",)),
    ],
)
@pytest.mark.parametrize("debug", ["", "1"])
def test_whatever_is_raised_ends_in_one_line(capsys, monkeypatch, tmp_path, error, parts, debug):
    monkeypatch.setenv(crashes.DEBUG, debug)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def fails() -> int:
        raise error

    assert crashes.guarded("domainbed-sfp train", fails) == 1
    told = capsys.readouterr().err
    (saved,) = tmp_path.glob("*.traceback.txt")
    assert "in fails" in saved.read_text() and str(saved) in told
    for part in parts:
        assert part in told.splitlines()[-1]
    assert ("Traceback" in told) == bool(debug) and (debug or told.count("\n") == 1)


def test_a_traceback_that_cannot_be_saved_is_not_promised(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    assert crashes.guarded("domainbed-sfp list", lambda: 1 // 0) == 1
    assert f"{crashes.DEBUG}=1 shows the traceback" in capsys.readouterr().err


def test_an_interruption_and_a_user_error_keep_their_statuses(capsys):
    def interrupted() -> int:
        raise KeyboardInterrupt

    def refused() -> int:
        raise UserError("two\nlines")

    assert crashes.guarded("x", interrupted) == 130 and crashes.guarded("x", refused) == 2
    assert capsys.readouterr().err == "error: two lines\n"


@pytest.mark.parametrize("redirection, status", [("| head -1", 0), ("| true", 0), (">/dev/full", 1)])
def test_output_that_nobody_takes(tmp_path, redirection, status):
    command = f"set -o pipefail; {sys.executable} -m domainbed_sfp list hparams {redirection}"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == status and "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert done.stderr.count("error: ") == status
