"""Photographs with a mark that agrees with the class."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from image_trees import make_tree
from PIL import Image

from domainbed_sfp.core.errors import UserError
from domainbed_sfp.data import base, get_dataset_class
from domainbed_sfp.data.attributes import draw_attribute
from domainbed_sfp.data.base import dataset
from domainbed_sfp.data.images import augmentation
from domainbed_sfp.data.loaders import MinibatchLoader
from domainbed_sfp.data.sets.folders import PACS, Folder
from domainbed_sfp.data.sets.stamped import FRAME_WIDTH, MARKS, STAMPS, Stamped, mark_colors, stamp_images
from domainbed_sfp.leaderboard.facts import facts_of
from domainbed_sfp.training.hparams import resolve_hparams

CPU = torch.device("cpu")
CLASSES = ("cat", "dog", "eel", "fox")


class StampedFolder(Stamped):
    """As in the docstring of `Stamped`, but without a name of its own."""

    PHOTOGRAPHS = Folder


def options(stamp: str = "frame", size: int = 16, augment: bool = True) -> dict:
    return {"image_size": size, "data_augmentation": augment, "stamp": stamp}


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    return make_tree(tmp_path_factory.mktemp("photographs") / "tree", classes=CLASSES, n=40)


def everything(stamped, for_crops: bool = False) -> torch.Tensor:
    return torch.cat([environment.gather(np.arange(len(environment)), for_crops) for environment in stamped])


def marks_of(images: np.ndarray, plain: np.ndarray, stamp: str) -> np.ndarray:
    """The mark that was put on each of `plain`, by trying all."""
    colors = mark_colors(len(CLASSES))
    tried = np.stack([stamp_images(plain, np.repeat(color[None], len(plain), 0), stamp) for color in colors])
    fits = (tried == images).all((2, 3, 4))
    assert (fits.sum(0) == 1).all()
    return fits.argmax(0)


@pytest.mark.parametrize("stamp", STAMPS)
def test_every_image_is_there_once_with_its_label_and_its_mark(tree, stamp):
    """Told by the pixels of the images that were not stamped, which are all different."""
    plain = Folder.build(str(tree), options(), 0, None)
    originals = everything(plain).permute(0, 2, 3, 1).numpy()
    labels = torch.cat([environment.labels for environment in plain])
    stamped = StampedFolder.build(str(tree), options(stamp), 3, None)
    assert [len(environment) for environment in stamped] == [160, 160, 160]
    assert [environment.name for environment in stamped.environments] == ["95%", "90%", "chance"]
    order = torch.randperm(480, generator=torch.Generator().manual_seed(3))
    for index, environment in enumerate(stamped.environments):
        mine = order[index::3]
        assert torch.equal(environment.labels, labels[mine])
        images = environment.gather(np.arange(160)).permute(0, 2, 3, 1).numpy()
        marks = marks_of(images, originals[mine.numpy()], stamp)
        assert np.array_equal(marks == environment.labels.numpy(), environment.aligned.numpy())
        assert environment.aligned.float().mean().item() == pytest.approx([0.95, 0.9, 0.25][index], abs=0.07)


def test_an_attribute_agrees_as_often_as_it_should_and_else_is_any_other():
    labels = torch.arange(7).repeat(10_000)
    for agreement in (0.95, 0.9, 1 / 7):
        attribute, aligned = draw_attribute(labels, agreement, 7, torch.Generator().manual_seed(0))
        assert torch.equal(attribute == labels, aligned)
        assert aligned.float().mean().item() == pytest.approx(agreement, abs=0.005)
        away = torch.bincount((attribute - labels) % 7, minlength=7)[1:].float() / (~aligned).sum()
        assert away == pytest.approx(torch.full((6,), 1 / 6), abs=0.03)


def test_the_seed_deals_and_marks(tree):
    one, again, other = (StampedFolder.build(str(tree), options(), seed, None) for seed in (0, 0, 1))
    assert torch.equal(everything(one), everything(again)) and torch.equal(one[0].aligned, again[0].aligned)
    assert not torch.equal(one[0].labels, other[0].labels) and not torch.equal(one[0].aligned, other[0].aligned)


def test_stamps_share_the_cache_of_the_photographs(tree, tmp_path):
    Folder.build(str(tree), options(), 0, tmp_path)
    before = sorted(tmp_path.rglob("*.npy"))
    for seed, stamp in enumerate(STAMPS):
        dataset = StampedFolder.build(str(tree), options(stamp), seed, tmp_path)
        assert everything(dataset, for_crops=True).shape == (480, 3, 24, 24)
        assert sorted(tmp_path.rglob("*.npy")) == before and len(before) == 12


def test_files_of_several_sizes_are_cropped_from_one(tmp_path):
    """Environments whose files are of other sizes have crops of other sizes, and one minibatch needs one."""
    root = make_tree(tmp_path / "tree", ["a"], classes=CLASSES)
    make_tree(root, ["b"], classes=CLASSES, size=(12, 10))
    assert [environment.training_images is None for environment in Folder.build(str(root), options(), 0, None)] == [
        *(False, True)
    ]
    dataset = StampedFolder.build(str(root), options(), 0, None)
    assert everything(dataset, for_crops=True).shape == (64, 3, 24, 24)
    sizes = torch.cat([environment.sizes for environment in dataset])
    assert sorted(sizes[:, 0].unique().tolist()) == [12, 24]


def test_a_mark_looks_the_same_at_both_sizes():
    image = np.full((1, 128, 128, 3), 200, dtype=np.uint8)
    for stamp in STAMPS:
        for color in mark_colors(len(MARKS) + 1):
            large = stamp_images(image, color[None], stamp)[0]
            halved = np.asarray(Image.fromarray(large).resize((64, 64), Image.Resampling.BOX), dtype=int)
            small = stamp_images(image[:, :64, :64], color[None], stamp)[0]
            assert np.abs(halved - small).mean() < 12


@pytest.mark.parametrize("stamp", STAMPS)
@pytest.mark.parametrize("classes", [2, 10, 65, 100])
def test_every_class_has_a_mark_of_its_own(stamp, classes):
    images = np.tile(np.linspace(0, 255, 32).astype(np.uint8)[None, :, None, None], (classes, 1, 32, 3))
    stamped = stamp_images(images, mark_colors(classes), stamp)
    labels = {image.tobytes(): label for label, image in enumerate(stamped)}
    assert len(labels) == classes
    # Mirrored, as augmentation makes it, no mark is another class's.
    assert all(labels.get(image[:, ::-1].tobytes(), label) == label for label, image in enumerate(stamped))


@pytest.mark.parametrize("stamp", ["frame", "corner"])
def test_marks_survive_augmentation(stamp):
    """Of the strongest crops DomainBed draws, few leave no pixel of a mark; a frame is never cut off."""
    image = np.full((1, 64, 64, 3), 100, dtype=np.uint8)
    marked = torch.from_numpy(stamp_images(image, mark_colors(2)[1:], stamp)).permute(0, 3, 1, 2).expand(500, 3, 64, 64)
    parameters = augmentation.draw_parameters(500, torch.full((500, 2), 64), torch.Generator().manual_seed(0))
    x = augmentation.augment(marked, parameters)
    is_seen = x.flatten(1).max(1).values - x.flatten(1).min(1).values > 0.5
    assert is_seen.float().mean() >= (1.0 if stamp == "frame" else 0.98)
    assert FRAME_WIDTH * 64 > 6


def test_marks_are_told_apart_after_the_hue_was_turned():
    """The two colours of a mark, all hues turned alike by any angle, are nearest to no other mark's."""
    colors = torch.from_numpy(MARKS).permute(0, 2, 1)[..., None].repeat(1, 1, 1, 2)  # two pixels, one of each colour
    turns = torch.linspace(-0.3, 0.3, 13)

    def turned(images: torch.Tensor, turn: float) -> torch.Tensor:
        from torchvision.transforms.functional import adjust_hue

        return torch.stack([adjust_hue(image, turn) for image in images]).float().flatten(1)

    own = torch.stack([turned(colors, float(turn)) for turn in turns], 1)  # [marks, turns, values]
    for mark in range(len(MARKS)):
        others = torch.cat([own[other] for other in range(len(MARKS)) if other != mark])
        assert torch.cdist(own[mark], others).min() > 80


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        (1, "expected two or more class folders"),  # no folder of photographs may have a single one
        (101, "StampedFolder: expected 2 to 100 classes, a mark for each, found 101"),
    ],
)
def test_fewer_or_more_classes_than_marks_can_tell_are_refused(tmp_path, classes, words):
    root = make_tree(tmp_path / "tree", ["a", "b"], classes=[f"c{index:03}" for index in range(classes)], n=1)
    with pytest.raises(UserError, match=words):
        StampedFolder.build(str(root), options(), 0, None)


def test_minibatches_carry_alignment_and_are_augmented(tree):
    dataset = StampedFolder.build(str(tree), options(), 0, None)
    keys = np.arange(0, 160, 2)
    loader = MinibatchLoader(dataset, [(0, keys), (1, keys)], 12, False, 0, CPU)
    first, second = loader.minibatches(5)
    loader.close()
    assert first[0].shape == second[0].shape == (12, 3, 16, 16)
    assert first.aligned.dtype == torch.bool and len(first.aligned) == 12


def test_stamped_pacs_is_made_of_pacs(tmp_path):
    make_tree(tmp_path / "PACS", ("art_painting", "cartoon", "photo", "sketch"), CLASSES, n=3)
    ours = get_dataset_class("StampedPACS")
    ours.check_files(str(tmp_path))
    assert ours.data_digest(str(tmp_path)) == PACS.data_digest(str(tmp_path)) is not None
    assert ours.differences(str(tmp_path)) == PACS.differences(str(tmp_path)) != []
    assert sum(len(environment) for environment in ours.build(str(tmp_path), options(), 0, None)) == 48
    with pytest.raises(UserError, match=r"there is no folder .*none/PACS.*download PACS"):
        ours.check_files(str(tmp_path / "none"))
    facts = facts_of("StampedPACS")
    assert facts.sizes == (3331, 3330, 3330) and facts.classes == 7 and facts.hparams == {"stamp": "frame"}


def test_the_stamp_is_an_hparam_of_stamped_sets_alone():
    assert resolve_hparams("ERM", "StampedPACS")["stamp"] == "frame"
    with pytest.raises(UserError, match="unknown hparam of ERM 'stamp'"):
        resolve_hparams("ERM", "PACS", overrides={"stamp": "tint"})
    with pytest.raises(UserError, match=r"unknown stamp of ERM 'frames'; did you mean 'frame'"):
        resolve_hparams("ERM", "StampedPACS", overrides={"stamp": "frames"})


def test_runs_of_two_stamps_are_not_one_protocol(main, tmp_path):
    """And a run's records tell how well SFP's flags find what the mark misleads."""
    make_tree(tmp_path / "PACS", ("art_painting", "cartoon", "photo", "sketch"), CLASSES, n=8)
    for stamp, algorithm in (("frame", "SFP"), ("corner", "ERM")):
        values = {"image_size": 16, "backbone": "mnist_cnn_bn", "batch_size": 8, "stamp": stamp}
        main(
            *("train", "--dataset", "StampedPACS", "--data_dir", ".", "--algorithm", algorithm, "--test_envs", 2),
            *("--steps", 8, "--checkpoint_freq", 4, "--skip_model_save", "--hparams", json.dumps(values)),
            *("--output_dir", f"runs/{stamp}"),
        )
    record = json.loads((tmp_path / "runs/frame/results.jsonl").read_text().splitlines()[-1])
    assert record["environments"] == ["95%", "90%", "chance"] and record["data_digest"]
    assert any(name.startswith("flag_precision") or name.startswith("flag_recall") for name in record)
    told = main("collect", "--input_dir", "runs").stdout
    assert "this table mixes protocols, data:" in told and "stamp corner in 1 runs" in told


@pytest.fixture
def own_datasets():
    """What a test registers is forgotten behind it."""
    with base.DATASETS.scope():
        yield


def test_a_stamped_set_of_ones_own_is_three_lines(tree, own_datasets):

    @dataset("StampedMine")
    class StampedMine(Stamped):
        PHOTOGRAPHS = Folder

    built = get_dataset_class("StampedMine").build(
        str(tree), resolve_hparams("ERM", "StampedMine", overrides={"image_size": 16}), 0, None
    )
    assert built.input_shape == (3, 16, 16) and built.num_classes == 4
