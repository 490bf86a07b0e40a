"""Files of a bundle that are none, too large, or not what they are called."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import tracemalloc
from pathlib import Path

import pytest
import torch
from changed_bundles import DATASET, assert_told, edit, edit_submission, name_of, problems, resum, runs

from domainbed_sfp.core.errors import UserError
from domainbed_sfp.leaderboard import validation
from domainbed_sfp.leaderboard.bundle import layout, mask_headers, tree
from domainbed_sfp.pruning import costs
from domainbed_sfp.runs import mask_files

# files ----------------------------------------------------------------------------------------------------------------


def test_a_record_edited_after_the_sums(copy):
    file = runs(copy)[0]
    true = hashlib.sha256(file.read_bytes()).hexdigest()
    edit(file, lambda record: record.update(loss=0.1))
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    assert_told(copy, name_of(file), "SHA-256", f"{true} (SHA256SUMS)", found)


def test_links_folders_unknown_and_executable_files(copy, tmp_path):
    (tmp_path / "secret").write_text("{}")
    (copy / "records" / "link.jsonl").symlink_to(tmp_path / "secret")
    (copy / "deep").mkdir()
    (copy / "setup.py").write_text("raise SystemExit(1)")
    os.mkfifo(copy / "records" / "pipe.jsonl")
    os.link(tmp_path / "secret", copy / "records" / "hard.jsonl")
    os.chmod(
        runs_file := next(
            file for file in sorted((copy / "records").iterdir()) if file.stem not in ("link", "pipe", "hard")
        ),
        0o755,
    )
    assert_told(copy, "records/link.jsonl", "", "a plain file", "a symbolic link")
    assert_told(copy, "deep", "", "submission.json, SHA256SUMS", "a folder")
    assert_told(copy, "setup.py", "", "submission.json, SHA256SUMS", "a file that does not belong there")
    assert_told(copy, "records/pipe.jsonl", "", "a plain file", "a device, pipe or socket")
    assert_told(copy, "records/hard.jsonl", "", "a file of its own", "a hard link")
    # A file system without such bits shows all files so, and nothing of a bundle is ever executed.
    assert not any(name_of(runs_file) in line and "executed" in line for line in problems(copy))


def test_a_file_that_changes_while_it_is_read(copy):
    found = tree.read_tree(copy)
    edit_submission(copy, lambda document: document.update(name="Other"))
    with pytest.raises(OSError, match="has changed while"):
        found.read("submission.json")


def test_a_folder_that_is_a_link(made, copy, tmp_path):
    shutil.move(copy / "records", tmp_path / "elsewhere")
    (copy / "records").symlink_to(tmp_path / "elsewhere")
    assert_told(copy, "records", "", "a plain file", "a symbolic link")
    (tmp_path / "link").symlink_to(made)
    with pytest.raises(UserError, match="expected the folder"):
        validation.validate(tmp_path / "link")


def test_names_that_lead_out_of_the_bundle(copy):
    with open(copy / "SHA256SUMS", "a") as file:
        file.write(f"{'0' * 64}  ../../etc/passwd\n{'1' * 64}  /etc/passwd\nnonsense\n")
    lines = len((copy / "SHA256SUMS").read_text().splitlines())
    assert_told(copy, "SHA256SUMS", f"line {lines - 2}", "the name of a file of the bundle", "../../etc/passwd")
    assert_told(copy, "SHA256SUMS", f"line {lines - 1}", "the name of a file of the bundle", "/etc/passwd")
    assert_told(copy, "SHA256SUMS", f"line {lines}", "64 hexadecimal digits", "nonsense")


def test_an_oversized_file(copy):
    file = copy / "records" / "big.jsonl"
    file.touch()
    os.truncate(file, 2**26 + 1)  # sparse: nothing is written
    assert_told(copy, "records/big.jsonl", "", "at most 67,108,864 bytes", "67,108,865")


@pytest.mark.parametrize(
    "folder, count, size, where, words",
    [
        ("records", 17, 2**26, "records", "at most 1,073,741,824 bytes in all files together, found 1,140,850,688"),
        ("masks", 129, 2**26, "bundle", "at most 8,589,934,592 bytes in all files together, found 8,657,"),
    ],
)
def test_a_bundle_that_is_too_large_is_not_read(tmp_path, monkeypatch, folder, count, size, where, words):
    """Sixty-four megabytes are allowed of a file, but not of all files; the sizes alone say so."""
    (root := tmp_path / "bundle").mkdir()
    (root / folder).mkdir()
    for number in range(count):
        name = f"{number}.jsonl" if folder == "records" else f"{number:064x}.safetensors"
        (root / folder / name).touch()
        os.truncate(root / folder / name, size)  # sparse: nothing is written
    (root / "submission.json").write_text("{}")
    monkeypatch.setattr(tree, "open_plain", lambda path: pytest.fail(f"{path} was opened"))
    (line,) = problems(root)
    assert line.startswith(f"{root if where == 'bundle' else where}: expected {words}")


def peak_of(folder: Path) -> tuple[list[str], int]:
    """The problems of a bundle, and the most bytes that Python held while it was validated."""
    tracemalloc.start()
    try:
        return problems(folder), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_line_without_end_is_not_held(copy):
    file = runs(copy)[0]
    with open(file, "a") as out:
        out.write('{"x": "' + 32 * 2**20 * "y")
    resum(copy)
    told, peak = peak_of(copy)
    assert f"{name_of(file)}: line 4: expected at most 262,144 bytes, found more" in told
    assert peak < 16 * 2**20


def test_records_repeat_in_memory_only_what_differs(copy):
    """Five hundred records that repeat a text of 15 kB hold it once."""
    file = runs(copy)[0]
    record = json.loads(file.read_text().splitlines()[-1])
    record["args"]["hparams"] = json.dumps({**json.loads(record["args"]["hparams"]), "note": 15_000 * "x"})
    with open(file, "w") as out:
        for step in range(500):
            out.write(json.dumps({**record, "step": step}) + "\n")
    resum(copy)
    told, peak = peak_of(copy)
    assert any("hparams of Magnitude" in line for line in told) and file.stat().st_size > 7 * 2**20
    assert peak < 5 * 2**20, peak


def test_values_without_end(copy, monkeypatch):
    """Numbers take far more memory than text; no run has so many."""
    monkeypatch.setattr(layout, "MOST_VALUES", 2000)
    for file in runs(copy):
        edit(file, lambda record: record.update({f"x{n}": n for n in range(800)}))
    resum(copy)
    told = problems(copy)
    first = min(file.name for file in runs(copy))
    assert f"records/{first}: line 3: expected at most 2,000 values in all records, found more" in told
    monkeypatch.undo()
    edit(runs(copy)[0], lambda record: record.update({f"x{n}": n for n in range(1000)}))
    assert any(
        line.startswith(name_of(runs(copy)[0]) + ": line 1: expected at most 1,000 fields") for line in problems(copy)
    )


def test_names_without_end(copy):
    """Every record has fields of its own: their names would be most of what is held."""
    file = runs(copy)[0]
    edit(file, lambda record: record.update({f"x{record['step']}_{n}": n for n in range(900)}))
    resum(copy)
    assert f"{name_of(file)}: line 3: expected at most 2,000 names in all records, found more" in problems(copy)


def test_more_runs_than_the_grid_has_are_not_read(copy, monkeypatch):
    whole = runs(copy)[0].read_bytes()
    for number in range(5):
        (copy / "records" / f"more{number}.jsonl").write_bytes(whole)
    resum(copy)
    monkeypatch.setattr(tree.Tree, "lines", lambda tree, name: pytest.fail(f"{name} was read"))
    assert problems(copy) == ["records: expected 4 files, one for each run of the protocol's grid, found 9"]


def test_a_list_of_problems_has_an_end(copy, monkeypatch):
    monkeypatch.setattr(validation, "MOST_TOLD", 7)
    for file in runs(copy):
        edit(file, lambda record: record.update(env0_in_acc=0.50001, env1_in_acc=0.50001, epoch=9.0))
    resum(copy)
    assert len(problems(copy)) == 7


def masks_file(tensors: dict, shapes: str, data: bytes) -> bytes:
    """A safetensors file whose header may say anything."""
    header = json.dumps({"__metadata__": {"shapes": shapes}, **tensors}).encode()
    return len(header).to_bytes(8, "little") + header + data


def one_mask(shape: list[int], size: int, **changes) -> tuple[dict, str]:
    return {"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size], **changes}}, json.dumps({"w": shape})


@pytest.mark.parametrize(
    "data, words",
    [
        (b"", "a header of 0 bytes in a file of 0"),
        ((2**40).to_bytes(8, "little") + b"{}", "a header of 1,099,511,627,776 bytes in a file of 10"),
        (masks_file({}, "[" * 100_000, b""), "nested too deeply"),
        (masks_file({"w": [[[]]]}, "{}", b""), "header.w: expected an object, found [[[]]]"),
        (masks_file(*one_mask([8], 1, dtype="F32"), b"\0"), 'header.w.dtype: expected "U8", found "F32"'),
        (masks_file(*one_mask([2**30, 2**30], 1), b"\0"), "'w' is not one bit for each of [1073741824, 1073741824]"),
        (masks_file(*one_mask([8, -1], 1), b"\0"), "shapes.w[1]: expected at least 1, found -1"),
        (masks_file(*one_mask([8], 1, data_offsets=[1, 2]), b"\0\0"), "from byte 0 on"),
        (masks_file(*one_mask([8], 1), b"\0" * 9), "9 bytes of masks, the header declares 1"),
        (masks_file(one_mask([8], 1)[0], "{}", b"\0"), "do not name the same masks: 'w'"),
        (b"\2" + b"\0" * 7 + b"[]", "header: expected an object, found []"),
    ],
)  # fmt: skip
def test_headers_of_masks_are_read_before_the_masks(copy, monkeypatch, data, words):
    monkeypatch.setattr(mask_files, "unpack", lambda data: pytest.fail("the masks were unpacked"))
    names = sorted((copy / "masks").iterdir())
    for file in names:
        file.write_bytes(data)
    resum(copy)
    for file in names:
        told = [line for line in problems(copy) if line.startswith(f"masks/{file.name}: ")]
        assert len(told) == 1 and "masks, one bit a weight" in told[0] and words in told[0], told


def test_masks_that_no_network_has_are_not_unpacked(copy, monkeypatch):
    """Shapes and sums fit each other: only the network says that there is no such parameter, or not so many."""
    monkeypatch.setattr(mask_files, "unpack", lambda data: pytest.fail("the masks were unpacked"))
    names = sorted((copy / "masks").iterdir())
    for file in names:
        file.write_bytes(masks_file(*one_mask([1000, 8000], 10**6), bytes(10**6)))
    resum(copy)
    words = "at most 373,002 weights, the parameters of records/"
    assert any(f"masks/{names[0].name}: masks: expected {words}" in line for line in problems(copy))
    for file in names:
        file.write_bytes(masks_file(*one_mask([8], 1), b"\0"))
    resum(copy)
    told = problems(copy)
    assert f"masks/{names[0].name}: mask w: expected a parameter that is masked by Magnitude, found shape [8]" in told


def test_a_network_that_is_too_large_is_not_built(made, monkeypatch):
    monkeypatch.setattr(layout, "MOST_PARAMETERS", 300_000)
    monkeypatch.setattr(costs, "count_positions", lambda *args: pytest.fail("the network was built"))
    words = "line 1.hparams.backbone: expected a network of at most 300,000 parameters, found 371,712"
    assert any(line.startswith("records/") and line.endswith(words) for line in problems(made))


def test_what_pack_writes_has_the_header_that_is_read():
    masks = {"a": torch.ones(3, 5, dtype=torch.bool), "b.c": torch.zeros(16, dtype=torch.bool)}
    assert mask_headers.shapes_of(mask_files.pack(masks)) == {"a": (3, 5), "b.c": (16,)}


def test_a_pickle_is_not_opened(copy, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    name = next((copy / "masks").iterdir())
    name.write_bytes(pickle.dumps(Evil()))
    resum(copy)
    assert_told(copy, f"masks/{name.name}", "", "masks, one bit a weight", "not a file of masks")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "text, field, expected, found",
    [
        ("{not json", "", "a JSON document", "Expecting"),
        ('{"format": 1, "format": 1}', "", "a JSON document", "one name twice"),
        ("[" * 100_000, "", "a JSON document", "nested too deeply"),
        ('{"format": NaN}', "", "a JSON document", "NaN is not JSON"),
        ('{"format": ' + "[" * 60 + "]" * 60 + "}", "", "a JSON document", "nested too deeply"),
        ('{"name": "\\ud800"}', "", "a JSON document", "lone surrogate"),
        ('{"name": "SFP\\n"}', "name", "letters a to z", r'"SFP\n"'),
        ('{"format": 2}', "format", "1", "2"),
        ('{"commit": 1}', "commit", "text or null", "1"),
        ("[]", "", "object", "[]"),
    ],
)
def test_a_submission_that_is_not_one(copy, text, field, expected, found):
    (copy / "submission.json").write_text(text)
    resum(copy)
    assert_told(copy, "submission.json", field, expected, found)


def test_a_record_that_is_not_one(copy):
    file = runs(copy)[0]
    edit(file, lambda record: record.update(env0_in_acc="x", sparsity=-1, penalty=["x"]), slice(0, 1))
    with open(file, "a") as out:
        out.write("{]\n")
    resum(copy)
    assert_told(copy, name_of(file), "line 1.env0_in_acc", "number", '"x"')
    assert_told(copy, name_of(file), "line 1.sparsity", "at least 0", "-1")
    assert_told(copy, name_of(file), "line 1.penalty", "number or null", '["x"]')
    assert_told(copy, name_of(file), "line 4", "a JSON object", "Expecting")


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record["hparams"].update(batch_size=10**400),
        lambda record: record.update(epoch=10**400),
        lambda record: record.update(exported_bytes=10**400),
        lambda record: record["environment"].pop("domainbed_sfp"),
        lambda record: record["args"].update(steps=10**400, checkpoint_freq=10**400),
        lambda record: record["args"].update(test_envs=[0, 1, 2]),
        lambda record: record["args"].update(hparams='{"batch_size": ' + "[" * 60 + "]" * 60 + "}"),
    ],
    ids=["batch_size", "epoch", "cost", "fingerprint", "steps", "test_envs", "hparams"],
)
def test_values_that_no_run_has_are_told(copy, change):
    for file in runs(copy):
        edit(file, change)
    resum(copy)
    assert any(line.startswith("records/") for line in problems(copy))
    validation.text_of(validation.validate(copy))


def test_files_of_nothing_but_problems_are_told_in_part(copy):
    """A list that jsonschema would compare with itself, item by item; lines, fields and sums without end."""
    mixed = [[n] if n % 2 else str(n) for n in range(20_000)]
    edit_submission(copy, lambda d: d["datasets"][DATASET]["protocol"].update(test_envs=mixed))
    runs(copy)[0].write_text("{}\n" * 20_000)
    with open(copy / "SHA256SUMS", "a") as file:
        file.write("x\n" * 20_000)
    told = problems(copy)
    assert len(told) < 2_000 and {line.split(":")[0] for line in told} >= {"submission.json", "SHA256SUMS"}


def test_names_that_would_steer_a_terminal_are_spelled(made):
    outcome = validation.validate(made)
    outcome.submission["datasets"][DATASET]["results"]["oracle"]["cells"][0]["environment"] = "\x1b[2J\u202e"
    text = validation.text_of(outcome)
    assert "\x1b" not in text and r"\x1b[2J\u202e" in text


def test_all_problems_are_told_at_once(copy):
    one, two = runs(copy)[0], runs(copy)[3]
    edit(one, lambda record: record["args"].update(seed=7))
    edit(one, lambda record: record.update(env0_in_acc=0.50001), slice(0, 1))
    two.unlink()
    told = problems(copy)
    for part in ("args.seed", "line 1.env0_in_acc", "the grid", "SHA-256", f"{name_of(two)}: expected a file"):
        assert any(part in line for line in told), (part, told)


def test_an_empty_folder_and_none(tmp_path, main):
    told = problems(tmp_path)
    assert {line.split(":")[0] for line in told} == {"submission.json", "SHA256SUMS", "records"}
    done = main("leaderboard", "validate", tmp_path / "none", check=False)
    assert done.returncode == 2 and "expected the folder" in done.stderr
    assert main("leaderboard", "add", tmp_path, check=False).returncode == 1
