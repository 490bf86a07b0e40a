"""Entries rebuilt from their bundles, and signatures of authors."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from recomputed_bundles import DATASET, resum

from domainbed_sfp.leaderboard import validation
from domainbed_sfp.leaderboard.bundle import layout
from domainbed_sfp.leaderboard.commands import entries_of
from domainbed_sfp.leaderboard.submit import submit

# entries rebuilt from bundles -------------------------------------------------------------------------------------------


@pytest.fixture
def board(main, made, tmp_path):
    """A folder of one entry whose bundle is archived beside it, and the page that was built from it."""
    (tmp_path / "bundles").mkdir()
    with tarfile.open(tmp_path / "bundles" / "one.tgz", "w:gz") as archive:
        archive.add(made, "bundle")
    main(
        "leaderboard", "add", tmp_path / "bundles" / "one.tgz", "--archive", "../bundles/one.tgz",
        "--entries_dir", "entries", "--rerun", 1,
    )  # fmt: skip
    main("leaderboard", "build", "--entries_dir", "entries", "--output_dir", "page")
    return tmp_path


CHECK = ("leaderboard", "build", "--check", "--entries_dir", "entries", "--output_dir", "page")


def test_an_entry_is_rebuilt_from_its_archived_bundle(main, board):
    (file,) = board.glob("entries/*/*.json")
    assert json.loads(file.read_text())["tier"] == "rerun-identical"
    assert main(*CHECK).stdout == "1 entries rebuilt from their bundles\n"
    assert main(*CHECK, "--recompute").stdout == "1 entries rebuilt from their bundles\n"
    (board / "page" / "leaderboard.csv").write_text("better")
    done = main(*CHECK, check=False)
    assert done.returncode == 1
    assert done.stdout.startswith("page/leaderboard.csv: expected what the entries give, found another")


def test_an_entry_that_its_bundle_does_not_give(main, board):
    (file,) = board.glob("entries/*/*.json")
    document = json.loads(file.read_text())

    def told(*flags, **changes) -> str:
        file.write_text(json.dumps({**document, **changes}))
        done = main(*CHECK, *flags, check=False)
        assert done.returncode in (1, 2), done.stdout
        return done.stdout + done.stderr

    place = str(file.relative_to(board))
    assert f"{place}: commit: expected " in told(commit="0123456789ab") and "as rebuilt from ../bundles" in told(
        commit=None
    )
    assert f"{place}: runs" in told(runs=[64 * "0"])
    assert f"{place}: author: expected null" in told(author=64 * "1")
    assert f"{place}: models.difference: expected 0.0" in told(
        "--recompute", models={**document["models"], "difference": 0.5}
    )
    assert f"{place}: archive: expected the entry's bundle, found" in told(archive="../bundles/none.tgz")
    results = json.loads(json.dumps(document["results"]))
    for result in results.values():
        cell = result["cells"][0]
        cell["trials"][0]["accuracy"] = cell["accuracy"] = 100.0
    assert f"{place}: results.oracle.cells[0].accuracy: expected " in told(results=results)
    file.write_text(json.dumps({**document, "archive": None}))
    done = main(*CHECK, check=False)
    assert f"1 without a bundle, checked for consistency alone: {DATASET}/{file.name}" in done.stdout


def test_archives_hold_nothing_but_a_bundle(main, made, tmp_path):
    def told(name: str, data: bytes) -> str:
        with tarfile.open(tmp_path / "other.tgz", "w:gz") as archive:
            archive.add(made, "bundle")
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        done = main("leaderboard", "validate", "other.tgz", "--records_only", check=False)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        return done.stderr

    assert "expected a bundle with submission.json, found 'bundle/setup.py' in it" in told("bundle/setup.py", b"")
    assert "other.tgz" in told("../../escape", b"x") and not (tmp_path.parent / "escape").exists()
    assert "expected at most 200 bytes" in told("bundle/SIGNATURE", b"0" * 300)
    (tmp_path / "none.tgz").write_bytes(b"nothing")
    assert main("leaderboard", "validate", "none.tgz", check=False).returncode == 2


# authors ------------------------------------------------------------------------------------------------------------------


def test_a_signed_bundle_and_what_its_signature_says(sweep, tmp_path, main):
    pytest.importorskip("cryptography")
    key = tmp_path / "key.pem"
    outcome = submit(str(sweep), "Magnitude", str(tmp_path / "b"), author_key=str(key))
    assert outcome.tier == "records-verified" and (key.stat().st_mode & 0o777) == 0o600
    (entry,) = entries_of(outcome)
    assert len(entry.author) == 64 and key.read_text().startswith("-----BEGIN PRIVATE KEY-----")
    again = submit(str(sweep), "Magnitude", str(tmp_path / "c"), author_key=str(key))
    assert entries_of(again)[0].author == entry.author and "BEGIN" not in (tmp_path / "b" / "SIGNATURE").read_text()

    def check_of(folder: Path) -> list[str]:
        return [problem.line() for problem in validation.validate(folder).problems]

    # What was signed was changed; the signature is another's, or missing; the key is the signer's and not the author's.
    resum(tmp_path / "b")
    assert check_of(tmp_path / "b") == []
    with open(tmp_path / "b" / layout.SUMS, "a") as sums:
        sums.write("\n")
    assert any("SIGNATURE: expected the signature of SHA256SUMS by key" in line for line in check_of(tmp_path / "b"))
    (tmp_path / "c" / "SIGNATURE").unlink()
    assert any("SIGNATURE: expected the signature" in line and "no file" in line for line in check_of(tmp_path / "c"))
    other = submit(str(sweep), "Magnitude", str(tmp_path / "d"))
    assert entries_of(other)[0].author is None
    (tmp_path / "d" / "SIGNATURE").write_text("0" * 128)
    assert any("author: expected the public key" in line for line in check_of(tmp_path / "d"))
    (tmp_path / "bad.pem").write_text("no key")
    done = main(
        "submit", "--input_dir", sweep, "--algorithm", "Magnitude", "--output", "e", "--author_key", "bad.pem", check=False
    )  # fmt: skip
    assert done.returncode == 2 and "expected an Ed25519 key" in done.stderr and not (tmp_path / "e").exists()
