"""Data sets, cache and minibatches."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from image_trees import make_tree
from PIL import Image
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.datasets import folder as torchvision_folder

from domainbed_sfp.core.errors import UserError
from domainbed_sfp.data import get_dataset_class
from domainbed_sfp.data.images import cache
from domainbed_sfp.data.images.augmentation import IMAGENET_MEAN, IMAGENET_STD
from domainbed_sfp.data.images.contents import IMAGE_EXTENSIONS
from domainbed_sfp.data.loaders import MinibatchLoader
from domainbed_sfp.data.sets.folders import _crop_side
from domainbed_sfp.sweep.spec import default_datasets

FOLDER_HPARAMS = {"image_size": 16, "data_augmentation": True}
CPU = torch.device("cpu")


def test_evaluation_images_equal_torchvisions(tmp_path):
    """Same files, order and labels as ImageFolder, same pixels as Resize, ToTensor and Normalize on PIL images."""
    root = make_tree(tmp_path / "tree", n=3)
    dataset = get_dataset_class("Folder").build(str(root), FOLDER_HPARAMS, 0, None)
    transform = transforms.Compose(
        [transforms.Resize((16, 16)), transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    )
    for env_i, name in enumerate("abc"):
        reference = ImageFolder(str(root / name), transform)
        ((x, y),) = dataset.evaluation_batches(env_i, CPU)
        assert torch.equal(x, torch.stack([image for image, _ in reference]))
        assert y.tolist() == reference.targets
    assert dataset.input_shape == (3, 16, 16) and dataset.num_classes == 2


def test_image_files_are_told_as_torchvision_does():
    assert torchvision_folder.IMG_EXTENSIONS == IMAGE_EXTENSIONS


def test_cache_is_keyed_by_content_and_size(tmp_path):
    one, two = make_tree(tmp_path / "one", ["a"]), make_tree(tmp_path / "two", ["a"])

    def images(root, size=16):
        paths = sorted((root / "a").rglob("*.png"))
        return cache.cached_images(paths, root / "a", size, tmp_path / "cache")[0]

    first = images(one)
    assert images(two).filename == first.filename  # a copy shares the entry
    assert images(one, 12).filename != first.filename
    changed = sorted((two / "a").rglob("*.png"))[0]
    stat = changed.stat()
    Image.new("RGB", (24, 20)).save(changed)
    os.utime(changed, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    renewed = images(two)
    assert renewed.filename != first.filename
    assert not renewed[0].any() and np.array_equal(renewed[1:], first[1:])
    with pytest.raises(ValueError, match="read-only"):
        first[0, 0, 0, 0] = 1


def test_cache_is_built_once_by_jobs_that_start_together(tmp_path, monkeypatch):
    root = make_tree(tmp_path / "tree", ["a"])
    paths = sorted(root.rglob("*.png"))
    built = []
    build = cache._build
    monkeypatch.setattr(cache, "_build", lambda *args: (built.append(1), build(*args)))
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(cache.cached_images(paths, root / "a", 16, tmp_path / "c")[0]))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1 and all(np.array_equal(result, results[0]) for result in results) and len(results) == 4


def test_a_failed_build_leaves_nothing_behind(tmp_path):
    root = make_tree(tmp_path / "tree", ["a"])
    paths = sorted(root.rglob("*.png"))
    paths[3].write_bytes(b"no image")
    with pytest.raises(UserError, match=r"3\.png"):
        cache.cached_images(paths, root / "a", 16, tmp_path / "c")
    assert not [entry for entry in (tmp_path / "c").iterdir() if entry.is_dir() and entry.name != "contents"]


def folders(directory: Path) -> list[Path]:
    return sorted(entry for entry in directory.iterdir() if entry.is_dir() and entry.name != "contents")


def test_what_a_killed_build_left_is_cleared_by_the_next(tmp_path):
    root = make_tree(tmp_path / "tree", ["a"])
    paths = sorted(root.rglob("*.png"))
    killed = f"""
import os, signal, sys
from pathlib import Path
from domainbed_sfp.data.images import cache
cache.decode = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
cache.cached_images([Path(path) for path in sys.argv[1:]], Path({str(root / "a")!r}), 16, Path({str(tmp_path / "c")!r}))
"""
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", killed, *map(str, paths)]).returncode == -signal.SIGKILL
        assert len(folders(tmp_path / "c")) == 1
    images, _ = cache.cached_images(paths, root / "a", 16, tmp_path / "c")
    assert folders(tmp_path / "c") == [Path(images.filename).parent]


@pytest.mark.parametrize("umask", [0o002, 0o027])
def test_a_cache_has_the_permissions_of_the_umask(tmp_path, umask):
    root = make_tree(tmp_path / "tree", ["a"])
    before = os.umask(umask)
    try:
        cache.cached_images(sorted(root.rglob("*.png")), root / "a", 16, tmp_path / "c")
    finally:
        os.umask(before)
    entries = [tmp_path / "c", *(tmp_path / "c").rglob("*")]
    assert len(entries) > 6
    for entry in entries:
        assert entry.stat().st_mode & 0o777 == (0o777 if entry.is_dir() else 0o666) & ~umask, entry


def test_a_cache_that_cannot_remember_contents_still_serves_them(tmp_path):
    """As for another user: what is written stays, what cannot be written is done without."""
    root = make_tree(tmp_path / "tree", ["a"])
    paths = sorted(root.rglob("*.png"))
    first, _ = cache.cached_images(paths, root / "a", 16, tmp_path / "c")
    for memo in (tmp_path / "c" / "contents").iterdir():
        memo.unlink()
    (tmp_path / "c" / "contents").rmdir()
    (tmp_path / "c" / "contents").write_text("")  # as root may write anywhere, a file stands in the way
    assert cache.cached_images(paths, root / "a", 16, tmp_path / "c")[0].filename == first.filename


@pytest.mark.parametrize("memo", [b"", b"\0" * 64, b"\xff" * 64], ids=["empty", "zeros", "ones"])
def test_damaged_memos_are_written_anew(tmp_path, memo):
    root = make_tree(tmp_path / "tree", ["a"])
    paths = sorted(root.rglob("*.png"))
    first, _ = cache.cached_images(paths, root / "a", 16, tmp_path / "c")
    (file,) = (path for path in (tmp_path / "c" / "contents").iterdir() if path.suffix != ".lock")
    whole = file.read_bytes()
    file.write_bytes(memo)
    assert cache.cached_images(paths, root / "a", 16, tmp_path / "c")[0].filename == first.filename
    assert file.read_bytes() == whole


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


DAMAGES = {
    "truncated": _truncate,
    "header only": lambda path: path.write_bytes(path.read_bytes()[:20]),
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(b"PK\3\4" + bytes(range(256))),
    "pickle": lambda path: np.save(path, np.array([None, "a"]), allow_pickle=True),
    "another shape": lambda path: np.save(path, np.zeros((3, 2), dtype=np.load(path).dtype)),
    "another type": lambda path: np.save(path, np.load(path).astype(np.float32)),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("file", ["images.npy", "sizes.npy"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_built_anew(tmp_path, file, damage):
    root = make_tree(tmp_path / "tree", ["a"])
    paths = sorted(root.rglob("*.png"))
    images, sizes = (np.array(array) for array in cache.cached_images(paths, root / "a", 16, tmp_path / "c"))
    (entry,) = folders(tmp_path / "c")
    DAMAGES[damage](entry / file)
    again = cache.cached_images(paths, root / "a", 16, tmp_path / "c")
    assert np.array_equal(again[0], images) and np.array_equal(again[1], sizes)
    assert (again[0].dtype, again[1].dtype) == (np.uint8, np.int32)
    assert folders(tmp_path / "c") == [entry]


def test_entries_are_on_the_disk_before_they_have_their_name(tmp_path, monkeypatch):
    root = make_tree(tmp_path / "tree", ["a"])
    done = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name), sync(fd)))
    monkeypatch.setattr(os, "replace", lambda old, new: (done.append("replace"), replace(old, new)))
    cache.cached_images(sorted(root.rglob("*.png")), root / "a", 16, tmp_path / "c")
    assert sorted(done[-3:-1]) == ["images.npy", "sizes.npy"] and done[-1] == "replace"


@pytest.mark.parametrize("kept", [False, True])
def test_sources_that_cannot_be_read_are_named(tmp_path, monkeypatch, kept):
    root = make_tree(tmp_path / "tree", ["a"])
    paths = sorted(root.rglob("*.png"))
    if kept:
        cache.cached_images(paths, root / "a", 16, tmp_path / "c")
    paths[3].unlink()
    paths[3].symlink_to("gone.png")
    with pytest.raises(UserError, match=r"^image '.*3\.png', a link to 'gone\.png', cannot be read \(No such file"):
        cache.cached_images(paths, root / "a", 16, tmp_path / "c")
    paths[3].unlink()
    paths[3].mkdir()  # as root may read everything, a directory cannot be
    with pytest.raises(UserError, match=r"^image '.*3\.png' cannot be read \(Is a directory"):
        cache.cached_images(paths, root / "a", 16, tmp_path / "c")
    with pytest.raises(UserError, match=r"^image '.*3\.png' cannot be read \(Is a directory"):
        cache.decode(paths[3], 16)


def test_hidden_folders_are_neither_environments_nor_classes(tmp_path):
    root = make_tree(tmp_path / "tree", n=3)
    expected = get_dataset_class("Folder").build(str(root), FOLDER_HPARAMS, 0, None)
    make_tree(root, [".DS_Store"], n=2)
    for name in ("a", "c"):
        (root / name / ".ipynb_checkpoints").mkdir()
        (root / name / ".DS_Store").write_bytes(b"")
    make_tree(root / "b", [".ipynb_checkpoints"], n=2)
    dataset = get_dataset_class("Folder").build(str(root), FOLDER_HPARAMS, 0, None)
    assert get_dataset_class("Folder").environment_names(str(root)) == ["a", "b", "c"]
    assert [env.name for env in dataset.environments] == ["a", "b", "c"] and dataset.num_classes == 2
    assert all(torch.equal(one.labels, two.labels) for one, two in zip(dataset.environments, expected.environments))
    make_tree(tmp_path / "PACS", ["art_painting", "cartoon", "photo", "sketch", ".ipynb_checkpoints"], n=1)
    get_dataset_class("PACS").check_files(str(tmp_path))


@pytest.mark.parametrize(
    "size, largest, side",
    [(224, 227, 227), (64, 128, 128), (224, 500, 288), (64, 500, 128), (300, 500, 300), (64, 40, 64)],
)
def test_side_of_the_copies_that_crops_are_cut_from(size, largest, side):
    assert _crop_side(size, largest) == side


def _loader(dataset, seed=0, balanced=False, batch_size=32, augment=True):
    dataset.augment = augment
    parts = [(i, np.arange(len(env))) for i, env in enumerate(dataset.environments)]
    return MinibatchLoader(dataset, parts, batch_size, balanced, seed, CPU)


def test_minibatches_depend_on_seed_and_step_only(tmp_path):
    root = make_tree(tmp_path / "tree")
    dataset = get_dataset_class("Folder").build(str(root), FOLDER_HPARAMS, 0, None)
    in_order = _loader(dataset)
    batches = [in_order.minibatches(step) for step in range(3)]
    jumped = _loader(dataset)
    for step in (2, 0):
        for (x, y), (x2, y2) in zip(jumped.minibatches(step), batches[step]):
            assert torch.equal(x, x2) and torch.equal(y, y2)
    assert not torch.equal(batches[0][0][0], batches[1][0][0])
    assert not torch.equal(_loader(dataset, seed=1).minibatches(0)[0][0], batches[0][0][0])
    assert len(batches[0]) == 3 and batches[0][0][0].shape == (32, 3, 16, 16)


def test_minibatches_of_training_are_augmented_unless_told_otherwise(tmp_path):
    root = make_tree(tmp_path / "tree")
    dataset = get_dataset_class("Folder").build(str(root), FOLDER_HPARAMS, 0, None)
    plain = {tuple(image.flatten().tolist()) for image in next(dataset.evaluation_batches(0, CPU))[0]}
    for augment in (False, True):
        x, _ = _loader(dataset, augment=augment).minibatches(0)[0]
        inside = [tuple(image.flatten().tolist()) in plain for image in x]
        assert all(inside) if not augment else not any(inside)


def test_an_environments_minibatch_does_not_depend_on_the_others(tmp_path):
    dataset = get_dataset_class("Folder").build(str(make_tree(tmp_path / "tree")), FOLDER_HPARAMS, 0, None)
    dataset.augment = True
    parts = [(i, np.arange(5 + i)) for i in range(3)]
    together = MinibatchLoader(dataset, parts, 8, False, 0, CPU).minibatches(3)
    alone = [MinibatchLoader(dataset, [part], 8, False, 0, CPU).minibatches(3)[0] for part in parts]
    for (x, y), (other_x, other_y) in zip(together, alone):
        assert torch.equal(x, other_x) and torch.equal(y, other_y)


def test_class_balance():
    dataset = get_dataset_class("FullColoredDigits").build(None, {}, 0, None)
    rare = dataset[0].labels == 3
    keys = np.flatnonzero((~rare | (torch.arange(len(rare)) < 100)).numpy())  # a few threes only
    share = []
    for balanced in (False, True):
        loader = MinibatchLoader(dataset, [(0, keys)], 4000, balanced, 0, CPU)
        ((_, y),) = loader.minibatches(0)
        share.append((y == 3).float().mean().item())
    assert share[0] < 0.05 and share[1] == pytest.approx(0.1, abs=0.02)


def test_minibatches_carry_alignment():
    dataset = get_dataset_class("ColoredDigits").build(None, {}, 0, None)
    (batch, *_) = _loader(dataset).minibatches(0)
    x, y = batch
    color = (x[:, 1].flatten(1).sum(1) > 0).long()
    assert torch.equal(batch.aligned, color == y)


def test_real_pacs(pacs_dir, tmp_path):
    dataset = get_dataset_class("PACS").build(
        str(pacs_dir), {**FOLDER_HPARAMS, "image_size": 32}, 0, tmp_path / "cache"
    )
    assert [len(env) for env in dataset.environments] == [2048, 2344, 1670, 3929]
    assert [env.name for env in dataset.environments] == ["art_painting", "cartoon", "photo", "sketch"]
    assert dataset.num_classes == 7


def test_an_environment_of_eight_images_a_class(main, tmp_path):
    """As dslr's mugs: splits, a batch of all of the environment, classes drawn alike, and a whole run."""
    names = ("amazon", "caltech10", "dslr", "webcam")
    for name, n in zip(names, (20, 20, 8, 12)):
        make_tree(tmp_path / "OfficeCaltech10", [name], n=n)
    values = {"image_size": 16, "backbone": "mnist_cnn", "batch_size": 13, "class_balanced": True}
    main(
        *(
            "train",
            "--dataset",
            "OfficeCaltech10",
            "--data_dir",
            ".",
            "--test_envs",
            3,
            "--steps",
            2,
            "--output_dir",
            "run",
        ),
        *("--skip_model_save", "--hparams", json.dumps(values)),
    )
    record = json.loads((tmp_path / "run/results.jsonl").read_text().splitlines()[-1])
    assert record["environments"] == list(names) and len(record["data_digest"]) == 16
    assert all(f"env{index}_{part}_acc" in record for index in range(4) for part in ("in", "out"))


def test_real_office_caltech(pacs_dir, tmp_path):
    if not (pacs_dir / "OfficeCaltech10").is_dir():
        pytest.skip("real OfficeCaltech10 is not here: it belongs into the same folder as PACS/")
    ours = get_dataset_class("OfficeCaltech10")
    assert ours.differences(str(pacs_dir)) == [] and ours.data_digest(str(pacs_dir)) is None
    built = ours.build(str(pacs_dir), {"image_size": 16, "data_augmentation": False}, 0, tmp_path / "cache")
    assert [len(env) for env in built.environments] == [958, 1123, 157, 295] and built.num_classes == 10
    assert torch.bincount(built[2].labels).tolist() == [12, 21, 12, 13, 10, 24, 22, 12, 8, 23]


def test_a_part_of_vlcs_is_called_one(tmp_path):
    make_tree(tmp_path / "VLCS_partial", ("Caltech101", "SUN09", "VOC2007"))
    ours = get_dataset_class("VLCSPartial")
    built = ours.build(str(tmp_path), FOLDER_HPARAMS, 0, None)
    assert [env.name for env in built.environments] == ours.environment_names() == ["Caltech101", "SUN09", "VOC2007"]
    assert len(ours.data_digest(str(tmp_path))) == 16  # so that tables tell it from all of VLCS
    with pytest.raises(UserError, match="VLCSPartial: there is no folder") as error:
        ours.check_files(str(tmp_path / "none"))
    assert "download" not in str(error.value)
    assert not {"VLCSPartial", "Folder"} & set(default_datasets())
