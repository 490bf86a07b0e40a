"""The download command against a local server, made archives and hostile ones."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import http.server
import io
import json
import os
import re
import shutil
import socket
import socketserver
import stat
import struct
import subprocess
import sys
import tarfile
import threading
import types
import urllib.error
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st

from domainbed_sfp.cli.main import main
from domainbed_sfp.core.errors import UserError
from domainbed_sfp.data import disk
from domainbed_sfp.data.download import archives, arrange, recipes, transfer, verify
from domainbed_sfp.data.download import commands as command

SMALL = verify._counted("PACS", ("cat", "dog"), {"art": (2, 1), "photo": (1, 3)})


def run_command(arguments):
    """The exit status of `domainbed-sfp download ARGUMENTS`."""
    with pytest.raises(SystemExit) as ended:
        main(["download", *arguments])
    return ended.value.code


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(transfer, "BACKOFF_S", 0.0)


@pytest.fixture
def small_pacs(monkeypatch):
    """PACS with 7 images in 2 domains, so that an archive is made in a moment."""
    monkeypatch.setattr(verify, "PACS", SMALL)


# Made archives --------------------------------------------------------------------------------------------


def tree_files(tree: verify.ImageTree, root: str = "") -> dict[str, bytes]:
    """Path -> contents of every image of a data set with known counts per class."""
    return {
        f"{root}{domain}/{name}/{number:04d}.jpg": f"{domain} {name} {number}".encode()
        for domain, classes in tree.class_images.items()
        for name, count in classes.items()
        for number in range(count)
    }


def make_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return path


def make_tar(path: Path, files: dict[str, bytes], *members: tarfile.TarInfo, mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for info in members:
            archive.addfile(info)
    return path


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def full_device(path: Path) -> io.FileIO:
    """A file, in place of the one at `path`, on a disk without any space."""
    return io.FileIO("/dev/full", "w")


needs_full_device = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")


def listing(folder: Path) -> list[str]:
    """Everything below a folder, hidden or not, but for the lock files that stay."""
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.suffix != ".lock" and path.name != ".downloads"
    )


def pacs_zip(folder: Path, name: str = "PACS.zip", root: str = "kfold/") -> Path:
    return make_zip(folder / name, tree_files(SMALL, root))


# A server with faults -------------------------------------------------------------------------------------


@dataclass
class Site:
    """What the server has and how it misbehaves; `requests` are (path, Range header, bytes of body sent)."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    ranges: bool = True
    if_range: bool = True
    etag: bool = True
    drop_after: list[int] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    requests: list[list] = field(default_factory=list)

    @property
    def sent(self) -> int:
        return sum(count for _, _, count in self.requests)


class Handler(http.server.BaseHTTPRequestHandler):
    site: Site

    def log_message(self, *args):
        pass

    def do_GET(self):
        site, wanted = self.site, self.headers.get("Range")
        entry = [self.path, wanted, 0]
        site.requests.append(entry)
        content = site.files.get(self.path)
        status = site.statuses.pop(0) if site.statuses else 200
        if content is None or status != 200:
            self.send_error(404 if content is None else status)
            return
        etag = f'"{hashlib.md5(content).hexdigest()}"'
        condition = self.headers.get("If-Range")
        start = 0
        if wanted and site.ranges and not (site.if_range and condition and condition != etag):
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
            if start >= len(content):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) - start))
        if site.etag:
            self.send_header("ETag", etag)
        self.end_headers()
        body = content[start:]
        if site.drop_after:
            body = body[: site.drop_after.pop(0)]
        # Noted before it is sent: the client may be done and the test be counting before we come back here.
        entry[2] = len(body)
        # A client that gives up on a full disk hangs up.
        with contextlib.suppress(ConnectionError):
            self.wfile.write(body)


@pytest.fixture
def site():
    site = Site()
    handler = type("Bound", (Handler,), {"site": site})
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as server:
        site.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield site
        server.shutdown()
        thread.join()


CONTENT = bytes(range(256)) * 4000  # 1,024,000 bytes: several reads


# Transfers ------------------------------------------------------------------------------------------------


def test_a_dropped_connection_continues_where_it_broke(site, tmp_path):
    site.files["/a.zip"], site.drop_after = CONTENT, [300_000, 300_000]
    assert transfer.fetch(f"{site.url}/a.zip", tmp_path, "a.zip").read_bytes() == CONTENT
    ranges = [wanted for _, wanted, _ in site.requests]
    assert ranges == [None, "bytes=300000-", "bytes=600000-"]
    assert site.sent == len(CONTENT), "no byte is sent twice"


def test_a_transfer_given_up_continues_in_the_next_command(site, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "MAX_FAILURES", 1)
    site.files["/a.zip"], site.drop_after = CONTENT, [400_000]
    with pytest.raises(transfer.TransferError, match=r"ended early .*400\.0 kB are kept"):
        transfer.fetch(f"{site.url}/a.zip", tmp_path, "a.zip")
    assert not (tmp_path / "a.zip").exists() and (tmp_path / "a.zip.part").stat().st_size == 400_000
    assert transfer.fetch(f"{site.url}/a.zip", tmp_path, "a.zip").read_bytes() == CONTENT
    assert site.sent == len(CONTENT)
    # And what is whole is not asked for again.
    transfer.fetch(f"{site.url}/a.zip", tmp_path, "a.zip")
    assert len(site.requests) == 2


def test_without_range_support_the_transfer_starts_over(site, tmp_path):
    site.files["/a.zip"], site.ranges, site.drop_after = CONTENT, False, [300_000]
    assert transfer.fetch(f"{site.url}/a.zip", tmp_path, "a.zip").read_bytes() == CONTENT
    assert site.sent == len(CONTENT) + 300_000


def test_a_server_that_never_gets_farther_is_given_up(site, tmp_path):
    site.files["/a.zip"], site.ranges, site.drop_after = CONTENT, False, [300_000, 200_000] * 25
    with pytest.raises(transfer.TransferError, match="tried 5 times"):
        transfer.fetch(f"{site.url}/a.zip", tmp_path, "a.zip")
    assert len(site.requests) == transfer.MAX_FAILURES


@pytest.mark.parametrize("if_range", [True, False], ids=["honours If-Range", "ignores If-Range"])
@pytest.mark.parametrize("etag", [True, False], ids=["etag", "no etag"])
def test_a_changed_file_is_fetched_from_its_start(site, tmp_path, monkeypatch, if_range, etag):
    monkeypatch.setattr(transfer, "MAX_FAILURES", 1)
    site.files["/a.zip"], site.drop_after, site.if_range, site.etag = CONTENT, [400_000], if_range, etag
    with pytest.raises(transfer.TransferError):
        transfer.fetch(f"{site.url}/a.zip", tmp_path, "a.zip")
    monkeypatch.setattr(transfer, "MAX_FAILURES", 3)
    # Another size, or with an ETag to tell by, the same size.
    site.files["/a.zip"] = changed = bytes(len(CONTENT) if etag else len(CONTENT) + 1)
    assert transfer.fetch(f"{site.url}/a.zip", tmp_path, "a.zip").read_bytes() == changed
    # A server told by If-Range sends the new file at once; else its answer gives the change away.
    assert len(site.requests) == (2 if if_range and etag else 3)


def test_a_file_that_shrank_below_what_we_have_is_fetched_anew(site, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "MAX_FAILURES", 1)
    site.files["/a.zip"], site.drop_after, site.etag = CONTENT, [400_000], False
    with pytest.raises(transfer.TransferError):
        transfer.fetch(f"{site.url}/a.zip", tmp_path, "a.zip")
    monkeypatch.setattr(transfer, "MAX_FAILURES", 3)
    site.files["/a.zip"] = b"short"
    assert transfer.fetch(f"{site.url}/a.zip", tmp_path, "a.zip").read_bytes() == b"short"


def test_another_address_does_not_continue_this_ones_part(site, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "MAX_FAILURES", 1)
    site.etag = False
    site.files |= {"/one/a.zip": CONTENT, "/two/a.zip": bytes(len(CONTENT))}
    site.drop_after = [400_000]
    with pytest.raises(transfer.TransferError):
        transfer.fetch(f"{site.url}/one/a.zip", tmp_path, "a.zip")
    assert transfer.fetch(f"{site.url}/two/a.zip", tmp_path, "a.zip").read_bytes() == bytes(len(CONTENT))


def test_passing_server_trouble_is_tried_again_and_lasting_trouble_is_not(site, tmp_path):
    site.files["/a.zip"], site.statuses = CONTENT, [503, 429]
    assert transfer.fetch(f"{site.url}/a.zip", tmp_path, "a.zip").read_bytes() == CONTENT
    assert len(site.requests) == 3
    with pytest.raises(transfer.TransferError, match="HTTP 404"):
        transfer.fetch(f"{site.url}/none.zip", tmp_path, "none.zip")
    assert len(site.requests) == 4


def test_an_unknown_host_is_not_tried_again(tmp_path, monkeypatch):
    calls = []

    def unknown_host(*args, **kwargs):
        calls.append(args)
        raise urllib.error.URLError(socket.gaierror(socket.EAI_NONAME, "Name or service not known"))

    monkeypatch.setattr(transfer.urllib.request, "urlopen", unknown_host)
    with pytest.raises(transfer.TransferError, match="Name or service not known"):
        transfer.fetch("http://nowhere.invalid/a.zip", tmp_path, "a.zip")
    assert len(calls) == 1


def test_no_server_at_all_is_one_line(tmp_path):
    with pytest.raises(transfer.TransferError, match="refused") as error:
        transfer.fetch("http://127.0.0.1:9/a.zip", tmp_path, "a.zip")
    assert "\n" not in str(error.value)


def test_a_wrong_checksum_removes_that_file_and_nothing_else(site, tmp_path):
    site.files |= {"/bad.gz": b"bad", "/good.gz": b"good"}
    md5 = hashlib.md5(b"good").hexdigest()
    good = transfer.fetch(f"{site.url}/good.gz", tmp_path, "good.gz", md5=md5)
    with pytest.raises(transfer.ChecksumError, match=rf"{hashlib.md5(b'bad').hexdigest()}.*{md5}.*removed"):
        transfer.fetch(f"{site.url}/bad.gz", tmp_path, "bad.gz", md5=md5)
    assert not (tmp_path / "bad.gz").exists() and good.read_bytes() == b"good"
    own = tmp_path / "own.gz"
    own.write_bytes(b"bad")
    with pytest.raises(transfer.ChecksumError):
        transfer.fetch(str(own), tmp_path, "own.gz", md5=md5)
    assert own.exists(), "a user's own file is never removed"


@needs_full_device
def test_a_full_disk_stops_a_transfer_at_once(site, tmp_path, monkeypatch):
    site.files["/a.zip"] = CONTENT
    monkeypatch.setattr(transfer, "open_part", full_device)
    with pytest.raises(UserError, match="the disk is full"):
        transfer.fetch(f"{site.url}/a.zip", tmp_path, "a.zip")
    assert len(site.requests) == 1


def test_a_disk_too_small_is_noticed_before_the_transfer(site, tmp_path, monkeypatch):
    site.files["/a.zip"] = CONTENT
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"takes 1\.0 MB.*1\.0 kB are left"):
        transfer.fetch(f"{site.url}/a.zip", tmp_path, "a.zip")
    assert not (tmp_path / "a.zip.part").exists()


def test_local_sources_are_used_where_they_lie(tmp_path):
    own = tmp_path / "my data.zip"
    own.write_bytes(b"x")
    assert transfer.fetch(str(own), tmp_path / "d", "a.zip") == own
    assert transfer.fetch(own.as_uri(), tmp_path / "d", "a.zip") == own
    assert not (tmp_path / "d").exists()
    with pytest.raises(UserError, match=r"no file .*none\.zip"):
        transfer.fetch(str(tmp_path / "none.zip"), tmp_path, "a.zip")
    with pytest.raises(UserError, match="only http, https and file"):
        transfer.fetch("ftp://host/a.zip", tmp_path, "a.zip")


def test_progress_is_lines_without_a_terminal_and_a_bar_on_one(monkeypatch, capsys):
    monkeypatch.setattr(transfer, "PLAIN_PROGRESS_S", 0.0)
    with transfer.progress("a.zip") as report:
        report(2_000_000, 4_000_000)
    assert capsys.readouterr().err == "a.zip: 2.0 MB of 4.0 MB\n"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with transfer.progress("a.zip") as report:
        report(4_000_000, 4_000_000)
    assert "4.0/4.0 MB" in capsys.readouterr().err


# Google Drive ---------------------------------------------------------------------------------------------


@pytest.fixture
def drive(monkeypatch):
    """A stand-in for gdown that serves `drive.files` by id and notes the calls."""
    module = types.ModuleType("gdown")
    module.files, module.calls = {}, []

    def fake_download(id, output, quiet, resume):
        module.calls.append((id, resume))
        answer = module.files[id]
        if isinstance(answer, Exception):
            raise answer
        Path(output).write_bytes(answer)
        return output

    module.download = fake_download
    monkeypatch.setitem(sys.modules, "gdown", module)
    return module


def test_pacs_comes_from_drive_by_its_id(drive, small_pacs, tmp_path, capsys):
    drive.files["1JFr8f805nMUelQWWmfnJR3y4_SYoN5Pd"] = pacs_zip(tmp_path).read_bytes()
    data = tmp_path / "data"
    assert run_command(["PACS", "--data_dir", str(data)]) == 0
    assert drive.calls == [("1JFr8f805nMUelQWWmfnJR3y4_SYoN5Pd", True)]
    assert verify.verify_tree("PACS", data) == []
    assert "PACS: 7 images, 2 domains, 2 classes" in capsys.readouterr().out
    assert not (data / ".downloads" / "PACS").exists(), "the archive is not kept"


def test_vlcs_and_office_home_have_upstreams_ids(drive, tmp_path):
    for dataset, file_id in {
        "VLCS": "1skwblH1_okBwxWxmRsp9_qi15hyPpxg8",
        "OfficeHome": "1uY0pj7oFsjMxRwaD3Sxy0jgel0fsYXLC",
    }.items():
        drive.files[file_id] = ConnectionError("quota exceeded\nmore lines")
        with pytest.raises(UserError, match=r"\(quota exceeded\).*try again later.*--from") as error:
            command.download(dataset, tmp_path)
        assert drive.calls.pop()[0] == file_id and "\n" not in str(error.value)


def test_a_share_link_given_with_from_goes_to_gdown_too(drive, small_pacs, tmp_path):
    drive.files["abcdefghijKLMNOP"] = pacs_zip(tmp_path).read_bytes()
    link = "https://drive.google.com/file/d/abcdefghijKLMNOP/view?usp=sharing"
    command.download("PACS", tmp_path / "data", [link])
    assert drive.calls == [("abcdefghijKLMNOP", True)]


def test_drives_refusal_page_is_not_kept_as_the_archive(drive, small_pacs, tmp_path):
    drive.files["1JFr8f805nMUelQWWmfnJR3y4_SYoN5Pd"] = b"<!DOCTYPE html><html>Quota exceeded</html>"
    with pytest.raises(UserError, match=r"neither a zip nor a tar.*DOCTYPE.*removed"):
        command.download("PACS", tmp_path / "data")
    drive.files["1JFr8f805nMUelQWWmfnJR3y4_SYoN5Pd"] = pacs_zip(tmp_path).read_bytes()
    command.download("PACS", tmp_path / "data")
    assert verify.verify_tree("PACS", tmp_path / "data") == []


def test_without_gdown_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gdown", None)
    with pytest.raises(UserError, match=r"pip install 'domainbed_sfp\[download\]'.*--from"):
        command.download("PACS", tmp_path)


def test_drive_writing_to_a_full_disk_says_so(drive, tmp_path):
    drive.files["1JFr8f805nMUelQWWmfnJR3y4_SYoN5Pd"] = OSError(28, "No space left on device")
    with pytest.raises(UserError, match="the disk is full"):
        command.download("PACS", tmp_path)


# Unsafe and damaged archives ------------------------------------------------------------------------------

ESCAPES = [
    "../evil.jpg",
    "kfold/../../evil.jpg",
    "/tmp/evil.jpg",
    "..\\evil.jpg",
    "C:\\evil.jpg",
    "C:evil.jpg",
]


def refused(tmp_path: Path, archive: Path, message: str) -> None:
    """The archive is refused with `message` and leaves nothing behind."""
    data = tmp_path / "data"
    outside = set(tmp_path.iterdir()) | {data}
    with pytest.raises(UserError, match=message) as error:
        command.download("PACS", data, [str(archive)])
    assert "\n" not in str(error.value)
    assert set(tmp_path.iterdir()) == outside and listing(data) == []
    assert archive.exists()


@pytest.mark.parametrize("name", ESCAPES)
@pytest.mark.parametrize("make", [make_zip, make_tar], ids=["zip", "tar"])
def test_members_that_lead_out_are_refused_by_name(small_pacs, tmp_path, make, name):
    archive = make(tmp_path / "a", {**tree_files(SMALL, "kfold/"), name: b"evil"})
    refused(tmp_path, archive, re.escape(repr(name)) + ".*refused")


def zip_link(path: Path, name: str, target: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in tree_files(SMALL, "kfold/").items():
            if member != name:
                archive.writestr(member, content)
        info = zipfile.ZipInfo(name)
        info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, target)
    return path


@pytest.mark.parametrize("target", ["/etc/passwd", "../../../etc/passwd", "../.."])
def test_links_out_of_the_tree_are_refused(small_pacs, tmp_path, target):
    files = tree_files(SMALL, "kfold/")
    name = "kfold/art/link"
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
        archive = make_tar(tmp_path / "a.tar", files, special(name, kind, target))
        refused(tmp_path, archive, f"{name} (leads out|points to no file|does not point)")
    refused(tmp_path, zip_link(tmp_path / "a.zip", name, target), f"{name} (leads out|points to no file)")


def test_a_link_to_a_folder_and_a_write_through_it_are_refused(small_pacs, tmp_path):
    link = special("kfold/door", tarfile.SYMTYPE, str(tmp_path))
    through = tarfile.TarInfo("kfold/door/evil.jpg")
    archive = make_tar(tmp_path / "a.tar", tree_files(SMALL, "kfold/"), link, through, mode="w")
    refused(tmp_path, archive, "kfold/door leads out")
    link.linkname = "art"
    archive = make_tar(tmp_path / "a.tar", tree_files(SMALL, "kfold/"), link, mode="w")
    refused(tmp_path, archive, "kfold/door points to no file")


@pytest.mark.parametrize("kind", [tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE])
def test_devices_and_pipes_are_refused(small_pacs, tmp_path, kind):
    archive = make_tar(tmp_path / "a.tar", tree_files(SMALL, "kfold/"), special("kfold/art/dev", kind))
    refused(tmp_path, archive, "kfold/art/dev is neither a file nor a folder")


def test_links_within_the_archive_become_copies(small_pacs, tmp_path):
    files = tree_files(SMALL, "./kfold/")
    del files["./kfold/art/cat/0001.jpg"], files["./kfold/photo/dog/0002.jpg"]
    archive = make_tar(
        tmp_path / "a.tar.gz",
        files,
        special("./kfold/art/cat/0001.jpg", tarfile.SYMTYPE, "0000.jpg"),
        special("./kfold/photo/dog/0002.jpg", tarfile.LNKTYPE, "kfold/photo/dog/0000.jpg"),
    )
    folder = command.download("PACS", tmp_path / "data", [str(archive)])
    for copy, original in {"art/cat/0001": "art/cat/0000", "photo/dog/0002": "photo/dog/0000"}.items():
        assert not (folder / f"{copy}.jpg").is_symlink()
        assert (folder / f"{copy}.jpg").read_bytes() == (folder / f"{original}.jpg").read_bytes()
    shutil.rmtree(folder)
    zipped = zip_link(tmp_path / "b.zip", "kfold/art/cat/0001.jpg", "0000.jpg")
    folder = command.download("PACS", tmp_path / "data", [str(zipped)])
    assert (folder / "art/cat/0001.jpg").read_bytes() == b"art cat 0"


@given(st.text(alphabet="./\\ab:~ \0", max_size=12))
def test_every_accepted_name_stays_below_the_folder(name):
    try:
        path = archives._checked(Path("a.zip"), name)
    except archives.ArchiveError:
        return
    if path is not None:
        assert os.path.normpath(f"/base/{path}").startswith("/base/")


def test_damaged_archives_leave_nothing_behind(small_pacs, tmp_path):
    whole = pacs_zip(tmp_path).read_bytes()
    torn = tmp_path / "torn.zip"
    torn.write_bytes(whole[: len(whole) // 2])
    refused(tmp_path, torn, r"torn\.zip: neither a zip nor a tar")
    flipped = tmp_path / "flipped.zip"
    flipped.write_bytes(whole.replace(b"art cat 1", b"art cat X"))
    refused(tmp_path, flipped, r"flipped\.zip: damaged: Bad CRC")
    packed = make_tar(tmp_path / "a.tar.gz", {**tree_files(SMALL, "kfold/"), "kfold/noise": os.urandom(20_000)})
    packed.write_bytes(packed.read_bytes()[:10_000])
    refused(tmp_path, packed, r"a\.tar\.gz: damaged")


# Putting a tree in place ----------------------------------------------------------------------------------


def test_from_a_url(site, small_pacs, tmp_path, capsys):
    site.files["/mirror/anything.zip"] = pacs_zip(tmp_path).read_bytes()
    site.drop_after = [100]
    data = tmp_path / "data"
    url = f"{site.url}/mirror/anything.zip?key=1"
    site.files["/mirror/anything.zip?key=1"] = site.files["/mirror/anything.zip"]
    assert run_command(["PACS", "--data_dir", str(data), "--from", url]) == 0
    assert (data / "PACS/art/cat/0001.jpg").read_bytes() == b"art cat 1"
    assert listing(data) == listing_of(tree_files(SMALL, "PACS/"))
    assert [wanted for _, wanted, _ in site.requests] == [None, "bytes=100-"]


def listing_of(files: dict[str, bytes]) -> list[str]:
    paths = {str(parent) for name in files for parent in Path(name).parents} - {"."}
    return sorted(paths | set(files))


@pytest.mark.parametrize("root", ["", "PACS/", "a/b/images/"])
def test_the_folder_with_the_domains_is_found(small_pacs, tmp_path, root):
    files = {**tree_files(SMALL, root), "readme.txt": b"", f"__MACOSX/{root}art/cat/._0.jpg": b"junk"}
    files[f"{root}art/cat/._0000.jpg"] = files[f"{root}.DS_Store"] = b"junk"
    for make in (make_zip, make_tar):
        data = tmp_path / make.__name__
        folder = command.download("PACS", data, [str(make(tmp_path / "a", files))])
        assert verify.verify_tree("PACS", data) == []
        assert set(listing(folder)) - {"readme.txt"} == set(listing_of(tree_files(SMALL)))


def test_an_archive_of_something_else_says_what_it_has(small_pacs, tmp_path):
    archive = make_zip(tmp_path / "a.zip", {"cats/1.jpg": b"", "notes.txt": b""})
    refused(tmp_path, archive, r"no folder with PACS's domains \(art, photo\) in the archive: cats, notes\.txt")


def test_an_incomplete_archive_is_not_put_in_place(small_pacs, tmp_path):
    files = tree_files(SMALL, "kfold/")
    del files["kfold/photo/dog/0001.jpg"]
    archive = make_zip(tmp_path / "a.zip", files)
    refused(tmp_path, archive, "not PACS as published: photo/dog: expected 3 images, found 2")


def test_a_complete_tree_is_left_alone(small_pacs, tmp_path, capsys):
    data = tmp_path / "data"
    marked = write_files(data, tree_files(SMALL, "PACS/")) / "PACS/art/cat/0000.jpg"
    marked.write_bytes(b"mine")
    assert run_command(["PACS", "--data_dir", str(data), "--from", str(pacs_zip(tmp_path))]) == 0
    assert marked.read_bytes() == b"mine"
    assert not (data / ".downloads").exists(), "nothing is written: the disk may be read-only"
    assert run_command(["PACS", "--data_dir", str(data), "--from", str(tmp_path / "PACS.zip"), "--force"]) == 0
    assert marked.read_bytes() == b"art cat 0"


def test_an_incomplete_tree_is_replaced_only_by_force(small_pacs, tmp_path):
    data = tmp_path / "data"
    write_files(data, {"PACS/art/cat/0000.jpg": b"mine", "PACS/notes.txt": b"mine"})
    source = [str(pacs_zip(tmp_path))]
    with pytest.raises(UserError, match=r"art/cat: expected 2 images, found 1; .*photo: .*--force"):
        command.download("PACS", data, source)
    assert (data / "PACS/notes.txt").read_bytes() == b"mine"
    command.download("PACS", data, source, force=True)
    assert listing(data) == listing_of(tree_files(SMALL, "PACS/"))


def test_force_with_a_bad_archive_keeps_the_old_tree(small_pacs, tmp_path):
    data = tmp_path / "data"
    before = listing(write_files(data, {"PACS/notes.txt": b"mine"}))
    bad = make_zip(tmp_path / "a.zip", {"kfold/art/cat/0.jpg": b""})
    with pytest.raises(UserError, match="not PACS as published"):
        command.download("PACS", data, [str(bad)], force=True)
    assert listing(data) == before


def test_an_empty_folder_is_no_obstacle_and_a_link_is_replaced_as_a_link(small_pacs, tmp_path):
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    (data / "PACS").mkdir(parents=True)
    source = [str(pacs_zip(tmp_path))]
    command.download("PACS", data, source)
    (data / "PACS").rename(elsewhere)
    (data / "PACS").symlink_to(elsewhere)
    command.download("PACS", data, source, force=True)
    assert not (data / "PACS").is_symlink() and verify.folder_problems("PACS", elsewhere) == []


def test_an_interrupted_unpack_leaves_no_tree(small_pacs, tmp_path, monkeypatch):
    opened = archives.open_new

    def interrupted(path):
        if path.name == "0002.jpg":
            raise KeyboardInterrupt
        return opened(path)

    monkeypatch.setattr(archives, "open_new", interrupted)
    with pytest.raises(KeyboardInterrupt):
        command.download("PACS", tmp_path / "data", [str(pacs_zip(tmp_path))])
    assert listing(tmp_path / "data") == []


def test_a_killed_unpack_leaves_no_tree_and_the_next_one_cleans_up(small_pacs, tmp_path):
    data, archive = tmp_path / "data", pacs_zip(tmp_path)
    killed = f"""
import os
from domainbed_sfp.data.download import archives, commands
opened = archives.open_new
archives.open_new = lambda path: os._exit(9) if path.name == "0001.jpg" else opened(path)
commands.download("PACS", {str(data)!r}, [{str(archive)!r}])
"""
    assert subprocess.run([sys.executable, "-c", killed], check=False).returncode == 9
    assert not (data / "PACS").exists() and len(list(data.glob(".PACS.unpacking-*"))) == 1
    command.download("PACS", data, [str(archive)])
    assert listing(data) == listing_of(tree_files(SMALL, "PACS/"))


@needs_full_device
def test_a_full_disk_while_unpacking_removes_what_was_unpacked(small_pacs, tmp_path, monkeypatch):
    opened = archives.open_new
    monkeypatch.setattr(
        archives,
        "open_new",
        lambda path: full_device(path) if path.name == "0002.jpg" else opened(path),
    )
    refused(tmp_path, make_tar(tmp_path / "a.tar.gz", tree_files(SMALL, "kfold/")), "the disk is full: unpacking")


def test_a_zip_that_cannot_fit_is_not_begun(small_pacs, tmp_path, monkeypatch):
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=10))
    refused(tmp_path, pacs_zip(tmp_path), "the disk is too full: unpacking PACS.zip takes 7[0-9] B")


def test_two_commands_for_one_data_set_do_not_meet(small_pacs, tmp_path):
    lock = tmp_path / "data" / ".downloads" / "PACS.lock"
    lock.parent.mkdir(parents=True)
    with FileLock(lock), pytest.raises(UserError, match="another process is putting PACS"):
        command.download("PACS", tmp_path / "data", [str(pacs_zip(tmp_path))])


def test_a_data_dir_that_cannot_be_made(small_pacs, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"putting PACS into .*file/data failed: Not a directory"):
        command.download("PACS", tmp_path / "file" / "data", [str(pacs_zip(tmp_path))])


# The data sets' own layouts -------------------------------------------------------------------------------


def test_office_home(tmp_path, monkeypatch):
    domains = {"Art": 65, "Clipart": 66, "Product": 65, "Real World": 65}
    monkeypatch.setattr(verify, "OFFICE_HOME", verify.ImageTree("office_home", verify.OFFICE_HOME.classes, domains))
    files = {
        f"OfficeHomeDataset_10072016/{domain}/{name}/00001.jpg": b"x"
        for domain in domains
        for name in verify.OFFICE_HOME.classes
    }
    archive = make_zip(tmp_path / "a.zip", files)
    with pytest.raises(UserError, match=r"Clipart: expected 66 images, found 65$"):
        command.download("OfficeHome", tmp_path, [str(archive)])
    files["OfficeHomeDataset_10072016/Clipart/Bed/00002.jpg"] = b"x"
    files["OfficeHomeDataset_10072016/ImageInfo.csv"] = b""
    make_zip(archive, files)
    assert command.download("OfficeHome", tmp_path, [str(archive)]) == tmp_path / "office_home"
    shutil.rmtree(tmp_path / "office_home/Real World/TV")
    (tmp_path / "office_home/Art/Toothbrush").mkdir()
    assert verify.verify_tree("OfficeHome", tmp_path) == [
        "Art/Toothbrush: unexpected folder",
        "Real World/TV: the class's folder is missing",
        "Real World: expected 65 images, found 64",
    ]


DUPLICATES = ["sketch/angel/sketch_005_000012.jpg", "clipart/animal_migration/clipart_006_000227.jpg"]


@pytest.fixture
def domain_net(tmp_path, monkeypatch):
    """Six archives with an image for each of 20 classes, and two of the listed duplicates beside them."""
    domains = list(verify.DOMAIN_NET_IMAGES)
    names = verify.domain_net_facts()[0][:20]
    monkeypatch.setattr(verify, "DOMAIN_NET_IMAGES", dict.fromkeys(domains, len(names)))
    for module in (verify, arrange):
        monkeypatch.setattr(module, "domain_net_facts", lambda: (names, tuple(DUPLICATES)))
    folder = tmp_path / "archives"
    folder.mkdir()
    for domain in domains:
        files = {f"{domain}/{name}/x.jpg": b"x" for name in names}
        files |= dict.fromkeys([each for each in DUPLICATES if each.startswith(domain)], b"x")
        make_zip(folder / f"{domain}.zip", files)
    return folder


def test_domain_net_from_a_folder_without_its_duplicates(domain_net, tmp_path):
    folder = command.download("DomainNet", tmp_path / "data", [str(domain_net)])
    assert folder.name == "domain_net" and sorted(os.listdir(folder)) == sorted(verify.DOMAIN_NET_IMAGES)
    assert not any((folder / each).exists() for each in DUPLICATES)
    (folder / DUPLICATES[0]).write_bytes(b"x")
    assert verify.verify_tree("DomainNet", tmp_path / "data") == ["sketch: expected 20 images, found 21"]


def test_domain_net_from_its_six_public_addresses(domain_net, tmp_path, site, monkeypatch):
    for path in domain_net.iterdir():
        site.files[f"/{path.name}"] = path.read_bytes()
    public = recipes.ARCHIVES["DomainNet"]
    assert [archive.urls[0].partition("multi-source")[2] for archive in public] == [
        *("/groundtruth/clipart.zip", "/infograph.zip", "/groundtruth/painting.zip"),
        *("/quickdraw.zip", "/real.zip", "/sketch.zip"),
    ]
    moved = tuple(recipes.Archive(archive.name, (f"{site.url}/{archive.name}",)) for archive in public)
    monkeypatch.setitem(recipes.ARCHIVES, "DomainNet", moved)
    command.download("DomainNet", tmp_path / "data")
    assert verify.verify_tree("DomainNet", tmp_path / "data") == [] and len(site.requests) == 6


def test_a_damaged_archive_of_six_costs_only_itself(domain_net, tmp_path, site, monkeypatch):
    moved = []
    for path in sorted(domain_net.iterdir()):
        site.files[f"/{path.name}"] = path.read_bytes()
        moved.append(recipes.Archive(path.name, (f"{site.url}/{path.name}",)))
    whole, site.files["/real.zip"] = site.files["/real.zip"], b"<html>"
    monkeypatch.setitem(recipes.ARCHIVES, "DomainNet", tuple(moved))
    with pytest.raises(UserError, match=r"real\.zip: neither a zip nor a tar"):
        command.download("DomainNet", tmp_path / "data")
    site.files["/real.zip"] = whole
    command.download("DomainNet", tmp_path / "data")
    assert len(site.requests) == 7


def test_a_missing_archive_of_six_is_named(domain_net, tmp_path):
    (domain_net / "quickdraw.zip").unlink()
    (domain_net / "real.zip").unlink()
    with pytest.raises(UserError, match=r"made of 6 files: --from lacks quickdraw\.zip, real\.zip"):
        command.download("DomainNet", tmp_path / "data", [str(domain_net)])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"has none of DomainNet's archives: clipart\.zip, "):
        command.download("DomainNet", tmp_path / "data", [str(tmp_path / "empty")])


def camera_traps(folder: Path, images: list[str]) -> list[str]:
    """The two archives of TerraIncognita with two annotation files, as --from arguments."""
    train = {
        "info": {"year": 2018},
        "categories": [{"id": 1, "name": "bird"}, {"id": 2, "name": "dog"}, {"id": 3, "name": "car"}],
        "images": [
            {"id": "a", "location": 38, "file_name": "a.jpg"},
            {"id": "b", "location": 46, "file_name": "b.jpg"},
            {"id": "c", "location": 7, "file_name": "c.jpg"},
        ],
        "annotations": [
            {"image_id": "a", "category_id": 1},
            {"image_id": "a", "category_id": 1},
            {"image_id": "b", "category_id": 1},
            {"image_id": "b", "category_id": 2},
            {"image_id": "c", "category_id": 2},
        ],
    }
    test = {
        "categories": train["categories"],
        "images": [
            {"id": "d", "location": 38, "file_name": "../../d.jpg"},
            {"id": "e", "location": 46, "file_name": "e.jpg"},
        ],
        "annotations": [{"image_id": "d", "category_id": 2}, {"image_id": "e", "category_id": 3}],
    }
    notes = {
        f"eccv_18_annotation_files/{name}_annotations.json": json.dumps(content).encode()
        for name, content in {"train": train, "cis_test": test}.items()
    }
    return [
        str(make_tar(folder / recipes.TERRA_IMAGES, {f"eccv_18_all_images_sm/{i}": i.encode() for i in images})),
        str(make_tar(folder / recipes.TERRA_ANNOTATIONS, notes)),
    ]


TERRA_SMALL = verify.ImageTree(
    "terra_incognita", ("bird", "dog"), dict.fromkeys(("location_38", "location_46")), totals=(9, 4)
)
IMAGES = ["a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg"]


def test_terra_incognita_is_sorted_by_location_and_category(tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "TERRA_INCOGNITA", TERRA_SMALL)
    folder = command.download("TerraIncognita", tmp_path / "data", camera_traps(tmp_path, IMAGES))
    files = {
        "location_38/bird/a.jpg",
        "location_38/dog/d.jpg",
        "location_46/bird/b.jpg",
        "location_46/dog/b.jpg",
    }
    assert {str(path.relative_to(folder)) for path in folder.rglob("*.jpg")} == files
    assert (folder / "location_46/dog/b.jpg").read_bytes() == b"b.jpg"
    assert verify.summary("TerraIncognita", folder)[-1] == (
        "  note: DomainBed's paper counts 9 images; 4 is what the public archive has held since"
    )
    (folder / "location_38/bird/a.jpg").unlink()
    assert verify.verify_tree("TerraIncognita", tmp_path / "data") == [
        "location_38/bird: the class has no image",
        "all domains: expected at least 4 images, found 3",
    ]


def test_terra_incognita_names_missing_images_and_bad_annotations(tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "TERRA_INCOGNITA", TERRA_SMALL)
    sources = camera_traps(tmp_path, ["a.jpg", "c.jpg"])
    with pytest.raises(UserError, match=r"lacks 2 of 3 annotated images, b\.jpg first"):
        command.download("TerraIncognita", tmp_path / "data", sources)
    make_tar(Path(sources[1]), {"x/train_annotations.json": b'{"images": [{"id": 1}]}'})
    with pytest.raises(UserError, match="not in the expected format: KeyError 'location'"):
        command.download("TerraIncognita", tmp_path / "data", sources)
    make_tar(Path(sources[1]), {"x/readme.txt": b""})
    with pytest.raises(UserError, match="no annotations of location_38, location_46 in it"):
        command.download("TerraIncognita", tmp_path / "data", sources)
    with pytest.raises(UserError, match=r"--from lacks eccv_18_annotations\.tar\.gz"):
        command.download("TerraIncognita", tmp_path / "data", sources[:1])
    ready = {f"TerraInc/{domain}/{name}/{n}.jpg": b"x" for domain in TERRA_SMALL.domain_images
             for name in TERRA_SMALL.classes for n in range(2)}  # fmt: skip
    command.download("TerraIncognita", tmp_path / "data", [str(make_zip(tmp_path / "ready.zip", ready))])
    assert verify.verify_tree("TerraIncognita", tmp_path / "data") == []


# MNIST ----------------------------------------------------------------------------------------------------


@pytest.fixture
def digits(tmp_path, monkeypatch):
    """The four files of an MNIST of 3 + 2 digits of 2 x 2 pixels: name -> plain bytes."""
    shapes = {
        "train-images-idx3-ubyte": (3, 2, 2),
        "train-labels-idx1-ubyte": (3,),
        "t10k-images-idx3-ubyte": (2, 2, 2),
        "t10k-labels-idx1-ubyte": (2,),
    }
    files, facts, public = {}, {}, []
    for name, shape in shapes.items():
        header = struct.pack(f">{1 + len(shape)}I", 0x800 + len(shape), *shape)
        files[name] = header + bytes(range(verify.IdxFile(shape, "").size - len(header)))
        facts[name] = verify.IdxFile(shape, hashlib.md5(files[name]).hexdigest())
        packed = gzip.compress(files[name], mtime=0)
        public.append(recipes.Archive(f"{name}.gz", (), hashlib.md5(packed).hexdigest()))
    monkeypatch.setattr(verify, "MNIST_FILES", facts)
    monkeypatch.setattr(arrange, "MNIST_FILES", facts)
    monkeypatch.setitem(recipes.ARCHIVES, "MNIST", tuple(public))
    return files


def test_mnist_tries_mirrors_until_the_checksum_is_right(digits, site, tmp_path, monkeypatch, capsys):
    public = []
    for archive in recipes.ARCHIVES["MNIST"]:
        site.files[f"/good/{archive.name}"] = gzip.compress(digits[archive.name[:-3]], mtime=0)
        site.files[f"/bad/{archive.name}"] = b"a page"
        urls = tuple(f"{site.url}/{mirror}/{archive.name}" for mirror in ("gone", "bad", "good"))
        public.append(recipes.Archive(archive.name, urls, archive.md5))
    monkeypatch.setitem(recipes.ARCHIVES, "MNIST", tuple(public))
    # RotatedMNIST is made of MNIST's files, StampedPACS of PACS's.
    assert verify.dataset_name("StampedPACS") == "PACS"
    assert run_command(["RotatedMNIST", "--data_dir", str(tmp_path)]) == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "MNIST/raw").iterdir()} == digits
    told = capsys.readouterr().err
    assert told.count("HTTP 404") == told.count("checksum is") == 4
    site.files["/good/t10k-labels-idx1-ubyte.gz"] = b"also a page"
    with pytest.raises(UserError, match=r"/good/t10k-labels.*checksum is .*\(3 addresses tried\); .*--from"):
        command.download("MNIST", tmp_path, force=True)
    assert verify.verify_tree("MNIST", tmp_path) == [], "the tree that was there is still there"


def test_mnist_from_recompressed_plain_or_zipped_copies(digits, tmp_path):
    names = list(digits)
    mixed = {f"{names[0]}.gz": gzip.compress(digits[names[0]], 1)}
    mixed |= {name.replace("-idx", ".idx"): digits[name] for name in names[1:]}
    folder = write_files(tmp_path / "mixed", mixed)
    command.download("MNIST", tmp_path / "one", [str(folder)])
    command.download("MNIST", tmp_path / "two", [str(path) for path in folder.iterdir()])
    zipped = make_zip(tmp_path / "mnist.zip", {f"MNIST/raw/{name}": data for name, data in mixed.items()})
    command.download("MNIST", tmp_path / "three", [str(zipped)])
    for each in ("one", "two", "three"):
        assert {path.name: path.read_bytes() for path in (tmp_path / each / "MNIST/raw").iterdir()} == digits


def test_mnist_of_other_contents_is_refused(digits, tmp_path):
    digits["train-labels-idx1-ubyte"] = digits["train-labels-idx1-ubyte"][:-1] + b"\xff"
    folder = write_files(tmp_path / "raw", digits)
    with pytest.raises(UserError, match="train-labels-idx1-ubyte: not MNIST's: contents' md5 is"):
        command.download("MNIST", tmp_path / "data", [str(folder)])
    assert listing(tmp_path / "data") == []
    torn = gzip.compress(digits["t10k-labels-idx1-ubyte"])[:-9]
    (folder / "t10k-labels-idx1-ubyte").write_bytes(torn)
    (folder / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(UserError, match=r"--from lacks train-labels-idx1-ubyte\.gz"):
        command.download("MNIST", tmp_path / "data", [str(folder)])


def test_mnist_verification_names_each_file(digits, tmp_path):
    raw = tmp_path / "MNIST/raw"
    write_files(raw, {f"{name}.gz": gzip.compress(content) for name, content in digits.items()})
    assert verify.verify_tree("ColoredMNIST", tmp_path) == []
    assert list(verify.undecodable("MNIST", tmp_path)) == []
    packed = raw / "train-images-idx3-ubyte.gz"
    whole, changed = packed.read_bytes(), bytearray(digits["train-images-idx3-ubyte"])
    changed[-1] ^= 1
    packed.write_bytes(gzip.compress(changed))
    (raw / "t10k-images-idx3-ubyte.gz").write_bytes(whole[:-9])
    told = list(verify.undecodable("MNIST", tmp_path))
    assert told[0].startswith("raw/train-images-idx3-ubyte.gz: not MNIST's contents (their md5 is ")
    assert told[1].startswith("raw/t10k-images-idx3-ubyte.gz: damaged (") and len(told) == 2
    packed.write_bytes(gzip.compress(digits["train-images-idx3-ubyte"][:-1]))
    (raw / "train-labels-idx1-ubyte.gz").write_bytes(b"a page")
    (raw / "t10k-images-idx3-ubyte.gz").unlink()
    (raw / "t10k-labels-idx1-ubyte").write_bytes(digits["t10k-images-idx3-ubyte"])
    assert verify.verify_tree("MNIST", tmp_path) == [
        "raw/train-images-idx3-ubyte.gz: expected 28 bytes, found 27",
        "raw/train-labels-idx1-ubyte.gz: not an idx file of 3 bytes",
        "raw/t10k-images-idx3-ubyte (or t10k-images-idx3-ubyte.gz) is missing (24 bytes expected)",
        "raw/t10k-labels-idx1-ubyte: not an idx file of 2 bytes",
    ]


# Facts and messages ---------------------------------------------------------------------------------------


COUNTED = ("VLCS", "PACS", "OfficeHome", "OfficeCaltech10")


def test_published_totals():
    sums = {name: sum(verify.image_tree(name).domain_images.values()) for name in COUNTED}
    assert sums == {"VLCS": 10_729, "PACS": 9_991, "OfficeHome": 15_588, "OfficeCaltech10": 2_533}
    assert verify.image_tree("OfficeCaltech10").domain_images == {
        **{"amazon": 958, "caltech10": 1_123, "dslr": 157, "webcam": 295}
    }
    assert sum(verify.DOMAIN_NET_IMAGES.values()) == 586_575
    sizes = {name: len(set(verify.image_tree(name).classes)) for name in verify.DATASETS if name != "MNIST"}
    assert sizes == {
        **{"VLCS": 5, "PACS": 7, "OfficeHome": 65, "OfficeCaltech10": 10, "TerraIncognita": 10, "DomainNet": 345}
    }
    names, duplicates = verify.domain_net_facts()
    assert len(duplicates) == len(set(duplicates)) == 9_431
    assert {each.split("/")[1] for each in duplicates} <= set(names)
    assert set(DUPLICATES) <= set(duplicates)
    assert verify.MNIST_FILES["train-images-idx3-ubyte"].size == 47_040_016


@pytest.fixture(scope="module")
def whole_vlcs(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("whole"), dict.fromkeys(tree_files(verify.VLCS, "VLCS/"), b"x"))


def test_a_partial_vlcs_is_told_by_domain_and_class(whole_vlcs):
    assert verify.verify_tree("VLCS", whole_vlcs) == []
    verify.verify("VLCS", whole_vlcs)
    assert verify.summary("VLCS", whole_vlcs / "VLCS") == [
        "VLCS: 10,729 images, 4 domains, 5 classes",
        *("  Caltech101: 1,415 images", "  LabelMe: 2,656 images", "  SUN09: 3,282 images"),
        "  VOC2007: 3,376 images",
    ]
    root = whole_vlcs / "VLCS"
    shutil.rmtree(root / "Caltech101")
    shutil.rmtree(root / "SUN09/dog")
    for path in sorted((root / "LabelMe/person").iterdir())[:237]:
        path.unlink()
    (root / "VOC2007/car/0000.jpg").rename(root / "VOC2007/car/0000.txt")
    (root / "extra/cat").mkdir(parents=True)
    (root / "VOC2007/cat").mkdir()
    assert verify.verify_tree("VLCS", whole_vlcs) == [
        "Caltech101: the domain's folder is missing (1,415 images expected)",
        "LabelMe/person: expected 1,237 images, found 1,000",
        "SUN09/dog: the class's folder is missing (30 images expected)",
        "VOC2007/car: expected 699 images, found 698",
        "VOC2007/cat: unexpected folder",
        "extra: unexpected folder (the domains are Caltech101, LabelMe, SUN09, VOC2007)",
    ]
    with pytest.raises(UserError, match=r"LabelMe/person: expected 1,237 images, found 1,000; ") as error:
        verify.verify("VLCS", whole_vlcs)
    assert f"domainbed-sfp download VLCS --data_dir {whole_vlcs}" in str(error.value)
    assert "\n" not in str(error.value)


def test_office_caltech_goes_by_its_own_names_and_by_those_of_office_31(tmp_path):
    files = tree_files(verify.OFFICE_CALTECH_10, "OfficeCaltech10/")
    write_files(tmp_path, dict.fromkeys(files, b"x"))
    assert verify.verify_tree("OfficeCaltech10", tmp_path) == []
    root = tmp_path / "OfficeCaltech10"
    (root / "caltech10").rename(root / "caltech")
    for domain in root.iterdir():
        (domain / "backpack").rename(domain / "back_pack")
        (domain / "laptop").rename(domain / "laptop_computer")
    assert verify.verify_tree("OfficeCaltech10", tmp_path) == []
    # Labels are positions in the sorted names, so other names must sort to the same place.
    for other, own in verify.OFFICE_CALTECH_10.synonyms.items():
        for names in (verify.OFFICE_CALTECH_10.classes, tuple(verify.OFFICE_CALTECH_10.domain_images)):
            renamed = [other if name == own else name for name in names]
            assert sorted(renamed) == renamed
    (root / "dslr/mug/0000.jpg").unlink()
    (root / "dslr/laptop").mkdir()
    assert verify.verify_tree("OfficeCaltech10", tmp_path) == [
        "dslr/laptop: expected 24 images, found 0",
        "dslr/mug: expected 8 images, found 7",
        "dslr/laptop_computer: unexpected folder",
    ]


def test_a_data_set_without_an_archive_says_where_it_comes_from(tmp_path):
    answer = r"Office-31.*Caltech-256.*no public archive.*amazon.*--verify_only"
    for sources in ([], [str(tmp_path)]):
        with pytest.raises(UserError, match=answer) as error:
            command.download("OfficeCaltech10", tmp_path / "data", sources)
        assert "\n" not in str(error.value)
    archive = make_zip(tmp_path / "copy.zip", tree_files(verify.OFFICE_CALTECH_10, "some/folder/"))
    folder = command.download("OfficeCaltech10", tmp_path / "data", [str(archive)])
    assert folder == tmp_path / "data" / "OfficeCaltech10"
    assert verify.verify_tree("OfficeCaltech10", tmp_path / "data") == []


def test_many_problems_are_ten_and_a_number(tmp_path, capsys):
    for domain in verify.PACS.domain_images:
        (tmp_path / "PACS" / domain).mkdir(parents=True)
    assert run_command(["PACS", "--data_dir", str(tmp_path), "--verify_only"]) == 2
    told = capsys.readouterr()
    lines = told.out.splitlines()
    assert len(lines) == 11 and lines[-1] == "and 18 more"
    assert lines[0] == "art_painting/dog: the class's folder is missing (379 images expected)"
    assert told.err == f"error: PACS in {tmp_path} is not complete: 28 problems\n"
    assert not (tmp_path / ".downloads").exists()


def test_missing_folders_are_told_apart(small_pacs, tmp_path):
    assert verify.verify_tree("PACS", tmp_path / "no") == [f"the folder {tmp_path / 'no'} does not exist"]
    assert verify.verify_tree("PACS", tmp_path) == [f"the folder {tmp_path / 'PACS'} does not exist"]
    inner = write_files(tmp_path / "pics", tree_files(SMALL))
    (problem,) = verify.verify_tree("PACS", inner)
    assert problem.endswith(f"{inner} itself looks like it: call it PACS and pass its parent folder")


def test_the_command_line(tmp_path):
    def call(*arguments):
        line = [sys.executable, "-m", "domainbed_sfp", "download", *arguments, "--data_dir", str(tmp_path)]
        return subprocess.run(line, capture_output=True, text=True, check=False)

    wrong = call("Office_Home")
    assert wrong.returncode == 2 and len(wrong.stderr.splitlines()) == 1
    assert "unknown data set 'Office_Home'; did you mean 'OfficeHome'?" in wrong.stderr
    absent = call("VLCS", "--verify_only")
    assert absent.returncode == 2
    assert absent.stdout == f"the folder {tmp_path / 'VLCS'} does not exist\n"
    assert absent.stderr == f"error: VLCS in {tmp_path} is not complete: 1 problem\n"


def test_downloading_does_not_wait_for_torch():
    package = Path(command.__file__).parents[1]
    # The package's own __init__ is passed over: what counts here is what the command's modules import.
    script = f"""
import sys, types
package = types.ModuleType("domainbed_sfp.data")
package.__path__ = [{str(package)!r}]
sys.modules["domainbed_sfp.data"] = package
import domainbed_sfp.data.download.commands
print(sorted({{"torch", "numpy", "gdown", "rich"}} & set(sys.modules)))
"""
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert answer.stdout == "[]\n"
