"""Where the public archives of data sets are."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Archive:
    """A public file: its name, the addresses that have it, best first, and its md5 where published."""

    name: str
    urls: tuple[str, ...]
    md5: str | None = None


def _drive(name: str, file_id: str) -> Archive:
    return Archive(name, (f"https://drive.google.com/uc?id={file_id}",))


def _mnist(name: str, md5: str) -> Archive:
    # torchvision.datasets.MNIST's mirrors and checksums, and the copy TensorFlow's tutorials use.
    hosts = (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
        "http://yann.lecun.com/exdb/mnist/",
    )
    return Archive(name, tuple(host + name for host in hosts), md5)


_VISDA = "http://csr.bu.edu/ftp/visda/2019/multi-source"
_LILA = "https://storage.googleapis.com/public-datasets-lila/caltechcameratraps"
TERRA_IMAGES, TERRA_ANNOTATIONS = "eccv_18_all_images_sm.tar.gz", "eccv_18_annotations.tar.gz"

# Addresses as in domainbed/scripts/download.py at b93c22a1cfc3, MNIST's apart. No checksums are published
# for the others: there the counts are the check.
ARCHIVES: dict[str, tuple[Archive, ...]] = {
    "VLCS": (_drive("VLCS.tar.gz", "1skwblH1_okBwxWxmRsp9_qi15hyPpxg8"),),
    "PACS": (_drive("PACS.zip", "1JFr8f805nMUelQWWmfnJR3y4_SYoN5Pd"),),
    "OfficeHome": (_drive("office_home.zip", "1uY0pj7oFsjMxRwaD3Sxy0jgel0fsYXLC"),),
    "TerraIncognita": (
        Archive(TERRA_ANNOTATIONS, (f"{_LILA}/{TERRA_ANNOTATIONS}",)),
        Archive(TERRA_IMAGES, (f"{_LILA}/{TERRA_IMAGES}",)),
    ),
    "DomainNet": (
        Archive("clipart.zip", (f"{_VISDA}/groundtruth/clipart.zip",)),
        Archive("infograph.zip", (f"{_VISDA}/infograph.zip",)),
        Archive("painting.zip", (f"{_VISDA}/groundtruth/painting.zip",)),
        Archive("quickdraw.zip", (f"{_VISDA}/quickdraw.zip",)),
        Archive("real.zip", (f"{_VISDA}/real.zip",)),
        Archive("sketch.zip", (f"{_VISDA}/sketch.zip",)),
    ),
    "MNIST": (
        _mnist("train-images-idx3-ubyte.gz", "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
        _mnist("train-labels-idx1-ubyte.gz", "d53e105ee54ea40749a09fcbcd1e9432"),
        _mnist("t10k-images-idx3-ubyte.gz", "9fb629c4189551a2d022fa330f9573f3"),
        _mnist("t10k-labels-idx1-ubyte.gz", "ec29112dd5afa0611ce80d1b7f02629c"),
    ),
}

# Where a data set without a public archive comes from.
ORIGINS = {
    "OfficeCaltech10": "the ten classes of Office-31 (Saenko et al. 2010: amazon, dslr, webcam) and Caltech-256",
}
