"""Brings one file from the web, Google Drive or this machine; interrupted transfers continue."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import re
import shutil
import socket
import ssl
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from domainbed_sfp.core import strict_json
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.data.disk import disk_error, in_bytes, require_space

CHUNK_BYTES = 1 << 18
TIMEOUT_S = 60.0
# Failures in a row without a byte of progress after which a transfer is given up; waits are 1, 2, 4, 8 s.
MAX_FAILURES = 5
BACKOFF_S = 1.0
PLAIN_PROGRESS_S = 5.0
# Statuses that may pass: timeout, too many requests, server trouble.
PASSING = {408, 425, 429, 500, 502, 503, 504}

DRIVE_ID = re.compile(r"https?://(?:drive|docs)\.google\.com/.*?(?:[?&]id=|/d/)([\w-]{10,})")


class TransferError(UserError):
    """The file could not be had; what has arrived of it is kept for the next try."""


class ChecksumError(UserError):
    """The file arrived whole but is not the published one; it has been removed."""


def is_url(source: str) -> bool:
    """Whether `source` has a scheme; a plain path has none (nor has `C:\\data`)."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", source) is not None


def local_path(source: str) -> Path | None:
    """The path behind a plain path or a file:// address, None for an address on a network."""
    if not is_url(source):
        return Path(source).expanduser()
    parts = urllib.parse.urlsplit(source)
    return Path(urllib.request.url2pathname(parts.path)) if parts.scheme == "file" else None


def source_name(source: str) -> str:
    """The file name a source goes by: the last part of its path, percent signs decoded."""
    path = local_path(source)
    if path is not None:
        return path.name
    return urllib.parse.unquote(urllib.parse.urlsplit(source).path).rpartition("/")[2]


def fetch(source: str, directory: Path, name: str, *, md5: str | None = None) -> Path:
    """The file at `source` (http, https, Google Drive, file or plain path), as a path on this machine.

    A local file is used where it lies. Anything else is written to `directory/name`, from `name.part` on
    when an earlier transfer of the same address was interrupted; a file that arrived whole before is not
    fetched again. Raises TransferError when it cannot be had, ChecksumError when its md5 is not `md5`.
    """
    path = local_path(source)
    if path is not None:
        if not path.is_file():
            raise UserError(f"there is no file {path}")
        _check_md5(path, md5, source, remove=False)
        return path
    directory.mkdir(parents=True, exist_ok=True)
    download = _Download(directory / name)
    if not download.complete(source):
        drive = DRIVE_ID.match(source)
        if drive:
            _from_drive(drive[1], source, download)
        elif urllib.parse.urlsplit(source).scheme in ("http", "https"):
            _from_http(source, download)
        else:
            raise UserError(f"{source}: only http, https and file addresses are understood")
    _check_md5(download.path, md5, source, remove=True)
    return download.path


def md5_of(path: Path) -> str:
    """The md5 of a file's bytes, in hexadecimal."""
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as opened:
        while chunk := opened.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _check_md5(path: Path, expected: str | None, source: str, *, remove: bool) -> None:
    if expected is None:
        return
    found = md5_of(path)
    if found != expected:
        if remove:
            path.unlink()
        done = "; the file was removed" if remove else ""
        raise ChecksumError(f"{source}: checksum is {found}, the published one is {expected}{done}")


@dataclass(frozen=True)
class Version:
    """What tells one version of a remote file from another; `total` is its size in bytes."""

    url: str
    etag: str | None = None
    modified: str | None = None
    total: int | None = None

    def same_file(self, other: Version) -> bool:
        """No field known on both sides differs."""
        pairs = zip(
            (self.url, self.etag, self.modified, self.total),
            (other.url, other.etag, other.modified, other.total),
        )
        return all(mine == theirs for mine, theirs in pairs if mine is not None and theirs is not None)


class _Download:
    """A file under way: `NAME` once whole, `NAME.part` before, `NAME.json` saying of what version."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.part = path.with_name(path.name + ".part")
        self.notes = path.with_name(path.name + ".json")

    def complete(self, url: str) -> bool:
        version = self.version()
        return self.path.is_file() and version is not None and version.url == url

    def version(self) -> Version | None:
        try:
            return Version(**strict_json.parse(self.notes.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def begin(self, version: Version) -> None:
        """Starts from nothing: bytes of another version must not stay in front of this one's."""
        try:
            self.part.unlink(missing_ok=True)
            self.notes.write_text(json.dumps(asdict(version)), encoding="utf-8")
        except OSError as error:
            raise disk_error(error, f"fetching {self.path.name}") from error

    def have(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def finish(self) -> None:
        self.part.replace(self.path)


def _from_http(url: str, download: _Download) -> None:
    name = download.path.name
    farthest = failures = 0
    with progress(name) as report:
        while True:
            try:
                if _http_attempt(url, download, report):
                    break
                reason = "the connection ended early"
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code} {error.reason}"
                if error.code not in PASSING:
                    raise TransferError(f"{url}: {reason}") from error
            except (OSError, http.client.HTTPException) as error:
                cause = error.reason if isinstance(error, urllib.error.URLError) else error
                reason = str(cause) or type(cause).__name__
                if _lasting(cause):
                    raise TransferError(f"{url}: {reason}") from error
            have = download.have()
            # Only getting farther than ever before counts: a server without Range starts over each time.
            failures = 1 if have > farthest else failures + 1
            farthest = max(farthest, have)
            if failures >= MAX_FAILURES:
                kept = f"; {in_bytes(have)} are kept, the same command continues there" if have else ""
                raise TransferError(f"{url}: {reason} (tried {failures} times){kept}")
            time.sleep(BACKOFF_S * 2 ** (failures - 1))
    download.finish()


def _lasting(cause: object) -> bool:
    """Whether trying again is of no use: no such host, or a certificate that is not trusted."""
    if isinstance(cause, socket.gaierror):
        return cause.errno != socket.EAI_AGAIN
    return isinstance(cause, ssl.SSLCertVerificationError)


def _http_attempt(url: str, download: _Download, report: Callable[[int, int | None], None]) -> bool:
    """One request, for all or for the rest; whether the file is whole afterwards."""
    known = download.version()
    if known is None or known.url != url:
        download.begin(Version(url))
        known = Version(url)
    have = download.have()
    if known.total is not None and have == known.total:
        return True
    headers = {"User-Agent": "domainbed_sfp", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        # If-Range makes the server send the whole new file when it has changed. Weak tags are not allowed.
        condition = known.etag if known.etag and not known.etag.startswith("W/") else known.modified
        if condition:
            headers["If-Range"] = condition
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        # We hold more bytes than the file has now: it is another version.
        download.begin(Version(url))
        return False
    with response:
        found = Version(url, response.headers["ETag"], response.headers["Last-Modified"], _total(response))
        if response.status == 206:
            if _range_start(response) != have or not known.same_file(found):
                download.begin(Version(url))
                return False
        else:
            have = 0
            download.begin(found)
        total = found.total
        if total is not None:
            require_space(download.path.parent, total - have, f"fetching {download.path.name}")
        with _writing(download.part) as output:
            have = _receive(response, output, have, total, report)
    return total is None or have == total


def _receive(
    response: http.client.HTTPResponse,
    output: IO[bytes],
    have: int,
    total: int | None,
    report: Callable[[int, int | None], None],
) -> int:
    report(have, total)
    while chunk := response.read1(CHUNK_BYTES):
        try:
            output.write(chunk)
        except OSError as error:
            raise disk_error(error, f"fetching {response.url}") from error
        have += len(chunk)
        report(have, total)
    return have


@contextlib.contextmanager
def _writing(part: Path) -> Iterator[IO[bytes]]:
    """The part file, opened to append: unbuffered, so that what arrived before a break is on disk."""
    try:
        output = open_part(part)
    except OSError as error:
        raise disk_error(error, f"writing {part}") from error
    with output:
        yield output


def open_part(part: Path) -> IO[bytes]:
    """Opens a partial file to append: the one place where fetched bytes meet the disk."""
    return part.open("ab", buffering=0)


def _total(response: http.client.HTTPResponse) -> int | None:
    """The whole file's size in bytes as this response tells it, None where it does not."""
    if response.status == 206:
        size = response.headers.get("Content-Range", "").rpartition("/")[2]
    else:
        size = response.headers.get("Content-Length", "")
    return int(size) if size.isdigit() else None


def _range_start(response: http.client.HTTPResponse) -> int | None:
    match = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return int(match[1]) if match else None


def _from_drive(file_id: str, url: str, download: _Download) -> None:
    try:
        import gdown
    except ImportError as error:
        raise UserError(
            f"{download.path.name} is on Google Drive: pip install 'domainbed_sfp[download]', "
            f"or open {url} in a browser and pass the file with --from"
        ) from error
    # gdown takes a file that exists for whole, and keeps its own parts beside it: it gets a folder to itself.
    folder = download.path.with_name(download.path.name + ".drive")
    known = download.version()
    if known is None or known.url != url:
        shutil.rmtree(folder, ignore_errors=True)
        download.begin(Version(url))
    folder.mkdir(exist_ok=True)
    print(f"fetching {download.path.name} from Google Drive ({file_id})", file=sys.stderr, flush=True)
    target = folder / download.path.name
    try:
        gdown.download(id=file_id, output=str(target), quiet=not sys.stderr.isatty(), resume=True)
    except Exception as error:
        # gdown lets requests' errors through beside its own, which moved between versions. requests' are
        # OSErrors without a number, so only a numbered one is the disk's.
        if isinstance(error, OSError) and error.errno is not None:
            raise disk_error(error, f"fetching {download.path.name}") from error
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise TransferError(_drive_refusal(download.path.name, url, reason)) from error
    if not target.is_file():
        raise TransferError(_drive_refusal(download.path.name, url, "no file came"))
    target.replace(download.path)
    shutil.rmtree(folder)


def _drive_refusal(name: str, url: str, reason: str) -> str:
    return (
        f"Google Drive did not give {name} ({reason}); its daily quota is often used up: "
        f"try again later, or open {url} in a browser"
    )


@contextlib.contextmanager
def progress(label: str) -> Iterator[Callable[[int, int | None], None]]:
    """Yields `report(done_bytes, total_bytes)`: a bar on a terminal, else a line on stderr now and then."""
    if sys.stderr.isatty():
        with _bar(label) as report:
            yield report
        return
    last = time.monotonic()

    def report_line(done: int, total: int | None) -> None:
        nonlocal last
        if time.monotonic() - last >= PLAIN_PROGRESS_S:
            last = time.monotonic()
            of = f" of {in_bytes(total)}" if total else ""
            print(f"{label}: {in_bytes(done)}{of}", file=sys.stderr, flush=True)

    yield report_line


@contextlib.contextmanager
def _bar(label: str) -> Iterator[Callable[[int, int | None], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress("{task.description}", *columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
