"""What a folder of images contains, what is left out of it, and layouts that are not `<environment>/<class>/<image>`."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from image_trees import FOLDER_RUN, make_tree
from PIL import Image
from runs_on_disk import read
from torchvision.datasets import ImageFolder

from domainbed_sfp.core.errors import UserError, look_alike, spelled
from domainbed_sfp.data import get_dataset_class
from domainbed_sfp.data.download import verify
from domainbed_sfp.data.images import layout
from domainbed_sfp.data.images.contents import HIDDEN, is_hidden, scan
from domainbed_sfp.data.images.published import tree_problems, unlike_published
from domainbed_sfp.leaderboard.documents.bundle_schema import RECORD_SCHEMA
from domainbed_sfp.leaderboard.documents.problems import problems_of

TINY = verify._counted("PACS", ("cat", "dog"), {"art": (2, 1), "map": (1, 3), "photo": (1, 1), "web": (2, 2)})


def files(root: Path, *paths: str, content: bytes = b"x") -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    return root


def tiny_files(layout: str = "{domain}/{name}/{number}.jpg") -> list[str]:
    return [
        layout.format(domain=domain, name=name, number=number)
        for domain, classes in TINY.class_images.items()
        for name, count in classes.items()
        for number in range(count)
    ]


@pytest.fixture
def two(tmp_path) -> Path:
    """Two environments of two classes of two images, deeper folders among them."""
    return files(
        tmp_path / "two", *(f"{e}/{c}/{f}" for e in "ab" for c in ("cat", "dog") for f in ("0.jpg", "x/1.PNG"))
    )


# What is taken and what is left out -----------------------------------------------------------------------


def test_images_are_found_in_the_order_of_torchvisions_image_folder(two):
    files(two, "a/cat/x-1/2.jpeg", "a/cat/x/y/3.webp", "a/cat/1.tif", "a/cat/Z/4.BMP")
    for environment in "ab":
        found = scan(two).environments[environment]
        expected = ImageFolder(str(two / environment))
        assert list(found) == expected.classes
        assert [str(file.path) for each in found.values() for file in each] == [path for path, _ in expected.samples]


SYSTEM = [
    ".ipynb_checkpoints", "@eaDir", "__MACOSX", ".git", "$RECYCLE.BIN", "System Volume Information", "lost+found", ".Trash-1000",
    "#recycle", ".thumbnails", "@Recycle", "Thumbs.db", "desktop.ini", ".DS_Store", "__pycache__",
]  # fmt: skip


@pytest.mark.parametrize("place", ["{}/cat/1.jpg", "a/{}/1.jpg", "a/cat/{}/1.jpg", "a/cat/x/{}/deeper/1.jpg"])
@pytest.mark.parametrize("name", SYSTEM)
def test_system_folders_are_skipped_at_every_depth(two, name, place):
    before = scan(two)
    files(two, place.format(name))
    after = scan(two)
    assert after.environments == before.environments and after.digest() == before.digest()
    assert after.left_out.as_record() == {"hidden": 1} and name in str(after.left_out)
    assert layout.check_classes(after, "Folder") == ["cat", "dog"]


def test_system_files_are_skipped_and_like_names_are_not(two):
    before = scan(two).counts()
    files(two, "a/cat/._0.jpg", "a/cat/.hidden.png", "b/dog/Thumbs.db", "b/.DS_Store", "desktop.ini")
    found = scan(two)
    assert found.counts() == before and found.left_out.as_record() == {"hidden": 5}
    assert not any(
        is_hidden(name) for name in ("#1", "@home", "$100", "_cats", "~", "lost", "macosx", "thumbs", "recycle")
    )
    assert all(name == name.lower() and is_hidden(name.upper()) for name in HIDDEN)


def test_whatever_is_left_out_is_counted_by_its_reason(two):
    files(two, "a/cat/notes.txt", "a/cat/moving.gif", "b/dog/x/still.gif", "b/dog/no_extension")
    files(two, "a/outside.jpg", "outside.png", "README.md", "a/list.csv")
    files(two, "a/dog/empty.jpg", content=b"")
    (two / "a/dog/gone.jpg").symlink_to("nowhere.jpg")
    (two / "a/dog/loop.jpg").symlink_to("loop.jpg")
    os.mkfifo(two / "a/dog/pipe.jpg")
    found = scan(two)
    assert found.counts() == {e: {"cat": 2, "dog": 2} for e in "ab"}
    assert found.left_out.as_record() == {
        "extension": 4, "misplaced": 2, "empty": 1, "unreadable": 1, "broken_link": 2,
    }  # fmt: skip
    assert str(found.left_out) == (
        "left out: 4 files of other kinds (.gif, .txt, no extension), 2 images outside the class folders (first "
        "'outside.png'), 1 empty file ('a/dog/empty.jpg'), 1 file or folder that cannot be read ('a/dog/pipe.jpg'), "
        "2 broken links (first 'a/dog/gone.jpg')"
    )


def test_what_may_not_be_read_is_left_out(two, monkeypatch):
    """As for another user than root, who may read everything."""
    access, scandir = os.access, os.scandir

    def refuse(folder):
        if str(folder).endswith("b/dog/x"):
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("a/cat/0.jpg") and access(path, mode))
    monkeypatch.setattr(os, "scandir", refuse)
    found = scan(two)
    assert found.counts() == {"a": {"cat": 1, "dog": 2}, "b": {"cat": 2, "dog": 1}}
    assert found.left_out.as_record() == {"unreadable": 2}


def test_links_are_followed_once_and_end(two, tmp_path):
    files(tmp_path / "elsewhere", "2.jpg", "deep/3.jpg")
    (two / "a/cat/linked").symlink_to(tmp_path / "elsewhere")
    (two / "a/cat/4.jpg").symlink_to(two / "b/cat/0.jpg")
    assert scan(two).counts()["a"] == {"cat": 5, "dog": 2} and not scan(two).left_out
    for path, target in {
        "a/cat/up": "..",
        "a/cat/x/root": two,
        "a/cat/again": "linked",
        "a/loop": "..",
        "all": ".",
    }.items():
        (two / path).symlink_to(target)
    (tmp_path / "elsewhere/deep/back").symlink_to("..")
    found = scan(two)
    assert found.counts() == {"a": {"cat": 5, "dog": 2}, "b": {"cat": 2, "dog": 2}}
    assert found.left_out.as_record() == {"repeated_link": 6}


def test_classes_and_environments_may_be_links(two):
    (two / "c").symlink_to("a")
    (two / "b/cow").symlink_to("../a/dog")
    assert scan(two).counts()["c"] == {"cat": 2, "dog": 2} and scan(two).counts()["b"]["cow"] == 2


def test_an_environment_that_is_not_there_is_no_matter_of_counting(two):
    (two / "ab").symlink_to("unmounted")
    with pytest.raises(UserError, match=r"ab' is a link to 'unmounted', which is not there; .* numbered anew"):
        get_dataset_class("Folder").environment_names(str(two))


def test_training_says_and_records_what_is_left_out(main, tmp_path):
    root = make_tree(tmp_path / "tree")
    plain = main(*FOLDER_RUN)
    assert "left out" not in plain.stderr and all("left_out" not in record for record in read(tmp_path / "run"))
    files(root, "a/cat/.ipynb_checkpoints/0-checkpoint.png", "b/dog/@eaDir/0.png/thumb.png", "c/cat/notes.txt")
    files(root, "c/dog/empty.png", content=b"")
    told = main(*FOLDER_RUN[:-3], "again", *FOLDER_RUN[-2:])
    (line,) = [line for line in told.stderr.splitlines() if "left out" in line]
    assert line.startswith(
        "Folder: left out: 2 hidden or system files and folders (first 'a/cat/.ipynb_checkpoints'), 1 file"
    )
    before, after = read(tmp_path / "run"), read(tmp_path / "again")
    assert after[-1]["left_out"] == {"hidden": 2, "extension": 1, "empty": 1}
    assert [record["data_digest"] for record in after] == [record["data_digest"] for record in before]
    assert after[-1]["env0_in_acc"] == before[-1]["env0_in_acc"]


def test_a_bundle_may_say_what_was_left_out():
    told = RECORD_SCHEMA["properties"]["left_out"]
    assert "left_out" not in RECORD_SCHEMA["required"]
    assert list(problems_of("records/a.jsonl", {"hidden": 2, "empty": 1}, told)) == []
    assert list(problems_of("records/a.jsonl", {"hidden": -1}, told)) and list(
        problems_of("records/a.jsonl", {"x": 1}, told)
    )


# Layouts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [
    ["train", "val"], ["Train", "Test"], ["training", "validation"], ["val", "test"], ["train", "valid", "test"],
    ["train2017", "val2017"], ["01_train", "02_test"], ["train_images", "test_images"], ["trainset", "testset"],
    ["train", "held_out", "dog"], ["query", "gallery"], ["dev", "train", "eval"], ["labeled", "unlabeled"],
])  # fmt: skip
def test_splits_are_known(names):
    assert set(layout.split_folders(names)) >= set(names) - {"dog"}


@pytest.mark.parametrize("names", [
    ["cat", "dog"], ["train", "bus", "car"], ["test_tube", "train"], ["all", "cat"], ["trainer", "valley"], ["dev", "cat"], ["1", "2"],
    ["train", "tram"], ["x"],
])  # fmt: skip
def test_classes_are_not_taken_for_splits(names):
    assert layout.split_folders(names) == []


def refused(root: Path, name: str = "Folder") -> str:
    cls = get_dataset_class(name)
    with pytest.raises(UserError) as told:
        cls.check_files(str(root))
    with pytest.raises(UserError) as told_by_build:
        cls.build(str(root), {"image_size": 16, "data_augmentation": False}, 0, None)
    assert str(told.value) == str(told_by_build.value) and "\n" not in str(told.value)
    return str(told.value)


@pytest.mark.parametrize("paths, words", [
    (["a/train/cat/1.jpg", "a/val/cat/1.jpg", "b/train/cat/1.jpg", "b/val/cat/1.jpg"], "look like splits (train, val)"),
    (["a/cat/1.jpg", "b/cat/1.jpg"], "expected two or more class folders in every environment (<environment>/<class>/"),
    (["a/x/cat/1.jpg", "a/x/dog/1.jpg", "b/x/cat/1.jpg"], "found one, 'x'; the classes seem to lie a level deeper (cat, dog)"),
    (["w/a/cat/1.jpg", "w/b/cat/1.jpg", "w/a/dog/1.jpg"], "found w; they seem to be in '{root}/w': pass that as --data_dir"),
    (["a/cat/1.jpg"], "expected two or more environment folders in '{root}', found a"),
    (["a/cat/1.jpg", "a/dog/1.gif", "b/cat/1.jpg", "b/dog/1.jpg"], "a/dog' holds no image (.jpg, .jpeg, .png, .ppm, .bmp, "
     ".pgm, .tif, .tiff, .webp) (left out: 1 file of another kind ('a/dog/1.gif')); add images or remove"),
    (["a/cat/1.jpg", "b/1.jpg"], "environment folder '{root}/b' holds no class folder (left out: 1 image outside the class"),
    (["a/cat/1.jpg", "a/dog/1.jpg", "a/cow/1.jpg", "b/cat/1.jpg", "b/Dog/1.jpg"],
     "disagree on their classes: 'cow' is in '{root}/a' but not in '{root}/b' (and 1 more)"),
    (["a/cat/1.jpg", "a/dog/1.jpg", "b/cat/1.jpg", "b/Dog/1.jpg"], "not in '{root}/b'; did you mean 'Dog'?"),
])  # fmt: skip
def test_other_layouts_are_refused_with_advice(tmp_path, paths, words):
    assert words.format(root=tmp_path / "d") in refused(files(tmp_path / "d", *paths))


def test_doubtful_layouts_are_said(tmp_path):
    split = files(tmp_path / "split", *(f"{e}/{c}/1.jpg" for e in ("train", "test") for c in ("cat", "dog")))
    (line,) = get_dataset_class("Folder").inspect(str(split))[1]
    assert line.startswith("warning: Folder: the environments look like splits of one domain (test, train)")
    deep = files(tmp_path / "deep", *(f"{e}/{d}/{c}/1.jpg" for e in "ab" for d in ("x", "y") for c in ("cat", "dog")))
    (line,) = get_dataset_class("Folder").inspect(str(deep))[1]
    assert (
        "all images lie deeper than <environment>/<class>/<image>, as 'a/x/cat/1.jpg' does; the classes are x, y"
        in line
    )


def test_classes_of_one_environment_that_look_alike_are_said(tmp_path):
    names = [unicodedata.normalize(form, "café") for form in ("NFC", "NFD")]
    root = files(tmp_path / "d", *(f"{e}/{c}/1.jpg" for e in "ab" for c in ("dog", *names)))
    (line,) = get_dataset_class("Folder").inspect(str(root))[1]
    assert line == "warning: Folder: the classes 'cafe\\u0301' and 'caf\\xe9' look alike, but are two folders"


def test_names_that_look_alike_are_spelled_out(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    root = files(tmp_path / "d", f"a/{composed}/1.jpg", "a/dog/1.jpg", f"b/{decomposed}/1.jpg", "b/dog/1.jpg")
    told = refused(root)
    assert "'caf\\xe9' is in" in told and "did you mean 'cafe\\u0301'?" in told and "look alike" in told


@pytest.mark.parametrize("one, other", [
    ("e\u0301", "é"), ("ﬁn", "fin"), ("cat\u200b", "cat"), ("c\u0430t", "cat"), ("a\u00a0b", "a b"), ("\uff24og", "Dog"),
])  # fmt: skip
def test_what_looks_alike_is_escaped(one, other):
    assert look_alike(one, other) and look_alike(other, one)
    assert {spelled(one, ["x", other]), spelled(other, [one])} == {ascii(one), ascii(other)}


@pytest.mark.parametrize(
    "one, other", [("café", "cafe"), ("狗", "猫"), ("cat", "cat"), ("cat", "dog"), ("über", "uber")]
)
def test_what_does_not_look_alike_stays_readable(one, other):
    assert not look_alike(one, other) and spelled(one, [other]) == repr(one)


# Published data sets --------------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch, tmp_path) -> Callable[..., Path]:
    """A PACS of 13 images in four domains, written below `tmp_path` in some layout."""
    monkeypatch.setattr(verify, "PACS", TINY)

    def write(layout: str = "{domain}/{name}/{number}.jpg", *others: str) -> Path:
        return files(tmp_path, *(f"PACS/{path}" for path in (*tiny_files(layout), *others)))

    return write


def test_the_published_images_in_their_layout_are_published(tiny):
    root = tiny(
        "{domain}/{name}/{number}.jpg",
        ".ipynb_checkpoints/x.jpg",
        "art/cat/.ipynb_checkpoints/0.jpg",
        "art/@eaDir/x/1.jpg",
    )
    assert get_dataset_class("PACS").differences(str(root)) == [] == verify.verify_tree("PACS", root)
    assert get_dataset_class("PACS").data_digest(str(root)) is None


@pytest.mark.parametrize("written, words", [
    ("{domain}/train/{name}/{number}.jpg", "expected two or more class folders"),
    ("x/{domain}/{name}/{number}.jpg", "found 1: x; they are in 'x': move them a level up"),
    ("{name}/{domain}/{number}.jpg", "found 2: cat, dog; its levels are swapped"),
    ("train/{domain}/{name}/{number}.jpg", "found 1: train; they are in 'train'"),
    ("{domain}s/extra/{name}/{number}.jpg", "expected two or more class folders"),
])  # fmt: skip
def test_published_sets_in_other_layouts_are_refused(tiny, written, words):
    root = tiny(written)
    assert words in refused(root, "PACS")
    assert verify.verify_tree("PACS", root)


def test_published_sets_below_splits_are_refused(tiny):
    tiny("train/{domain}/{name}/{number}.jpg")
    told = refused(tiny("val/{domain}/{name}/{number}.jpg"), "PACS")
    assert told.endswith(
        "found 2: train, val; they look like splits (train, val): merge them, <environment>/<class>/<image> is expected"
    )


def test_published_sets_with_another_folder_beside_the_domains_are_refused(tiny):
    told = refused(tiny("{domain}/{name}/{number}.jpg", "image_list/art.txt"), "PACS")
    assert "expected 4 environment folders in" in told and "(art, map, photo, web), found 5: " in told
    assert told.endswith("move 'image_list' elsewhere")


@pytest.mark.parametrize("written, words", [
    ("{domain}/{name}s/{number}.jpg", "class 'cats' in every domain, and no 'cat'"),
    ("{domain}_x/{name}/{number}.jpg", "domains called art_x, map_x, photo_x, web_x, not art, map, photo, web"),
    ("{domain}/{name}/{number}_a.jpg", None),
])  # fmt: skip
def test_published_sets_are_known_by_names_too(tiny, written, words):
    assert get_dataset_class("PACS").differences(str(tiny(written))) == ([words] if words else [])


def test_an_equal_total_is_not_enough(tiny):
    root = tiny()
    (root / "PACS/art/cat/0.jpg").rename(root / "PACS/photo/cat/9.jpg")
    assert get_dataset_class("PACS").differences(str(root)) == ["art has 2 images of 3", "photo has 3 images of 2"]
    (root / "PACS/photo/cat/9.jpg").rename(root / "PACS/art/dog/9.jpg")
    assert get_dataset_class("PACS").differences(str(root)) == ["art has other numbers of images in its classes"]
    for domain in TINY.domain_images:
        files(root, f"PACS/{domain}/cow/1.jpg")
    assert "3 classes in every domain (cat, cow, dog) of 2" in get_dataset_class("PACS").differences(str(root))


@given(
    st.dictionaries(
        st.sampled_from([*TINY.domain_images, "Art", "x"]),
        st.dictionaries(st.sampled_from(["cat", "dog", "Cat"]), st.integers(1, 3), min_size=2, max_size=3),
        min_size=4, max_size=4,
    ),
    st.booleans(),
)  # fmt: skip
def test_training_and_verification_agree_on_what_is_published(counts, is_near):
    if is_near:
        counts = {domain: dict(TINY.class_images[domain]) | counts.get(domain, {}) for domain in TINY.domain_images}
    assert bool(unlike_published(TINY, counts)) == bool(list(tree_problems(TINY, counts)))


def test_terra_incognita_is_known_by_its_domains_where_the_total_is_todays():
    tree = verify.image_tree("TerraIncognita")
    numbers = tree.domain_images_of[24_330]
    assert sum(numbers.values()) == 24_330 and list(numbers) == list(tree.domain_images)
    counts = {domain: dict.fromkeys(tree.classes, 0) | {"bird": n} for domain, n in numbers.items()}
    assert unlike_published(tree, counts) == []
    counts["location_38"]["bird"] -= 1
    counts["location_43"]["bird"] += 1
    assert unlike_published(tree, counts) == [
        "location_38 has 9,735 images of 9,736", "location_43 has 3,971 images of 3,970",
    ]  # fmt: skip


def test_verification_decodes_and_says_what_is_left_out(main, tmp_path, monkeypatch, tiny):
    root = tiny("{domain}/{name}/{number}.jpg", "art/cat/.DS_Store", "web/dog/notes.txt")
    for path in (root / "PACS").rglob("*.jpg"):
        Image.new("RGB", (8, 8)).save(path)
    verified = main("download", "PACS", "--data_dir", root, "--verify_only")
    assert (
        "left out: 1 hidden or system file or folder ('art/cat/.DS_Store'), 1 file of another kind" in verified.stdout
    )
    Image.new("RGB", (8, 8)).save(min((root / "PACS/map/cat").iterdir()), exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x03")
    doubtful = main("download", "PACS", "--data_dir", root, "--verify_only").stderr.splitlines()[-1]
    assert (
        doubtful.startswith("warning: PACS: decoded, but PIL has its doubts about image '") and "map/cat/" in doubtful
    )
    whole = (root / "PACS/map/dog/1.jpg").read_bytes()
    (root / "PACS/map/dog/1.jpg").write_bytes(whole[: len(whole) // 2])
    broken = main("download", "PACS", "--data_dir", root, "--verify_only", check=False)
    assert broken.returncode == 2 and "map/dog/1.jpg' cannot be decoded (" in broken.stdout
    assert broken.stderr.splitlines()[-1] == f"error: PACS in {root} is not complete: 1 problem"
