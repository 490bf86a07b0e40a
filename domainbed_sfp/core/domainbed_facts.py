"""DomainBed's fixed orders and names, as of its commit b93c22a1cfc3."""

from __future__ import annotations

# Rows of a table come in this order; names that are not here follow.
ALGORITHMS = (
    "ERM",
    "ERMPlusPlus",
    "Fish",
    "IRM",
    "GroupDRO",
    "Mixup",
    "MLDG",
    "CORAL",
    "MMD",
    "DANN",
    "CDANN",
    "MTL",
    "SagNet",
    "ARM",
    "VREx",
    "RSC",
    "SD",
    "ANDMask",
    "SANDMask",
    "IGA",
    "SelfReg",
    "Fishr",
    "TRM",
    "IB_ERM",
    "IB_IRM",
    "CAD",
    "CondCAD",
    "Transfer",
    "CausIRL_CORAL",
    "CausIRL_MMD",
    "EQRM",
    "RDM",
    "ADRMX",
    "URM",
)

# Environment i of a data set is the i-th name; the data sets are in the order of DomainBed's tables.
ENVIRONMENTS = {
    "Debug28": ("0", "1", "2"),
    "Debug224": ("0", "1", "2"),
    "ColoredMNIST": ("+90%", "+80%", "-90%"),
    "RotatedMNIST": ("0", "15", "30", "45", "60", "75"),
    "VLCS": ("C", "L", "S", "V"),
    "PACS": ("A", "C", "P", "S"),
    "OfficeHome": ("A", "C", "P", "R"),
    "TerraIncognita": ("L100", "L38", "L43", "L46"),
    "DomainNet": ("clip", "info", "paint", "quick", "real", "sketch"),
    "SVIRO": ("aclass", "escape", "hilux", "i3", "lexus", "tesla", "tiguan", "tucson", "x5", "zoe"),
    "WILDSCamelyon": ("hospital_0", "hospital_1", "hospital_2", "hospital_3", "hospital_4"),
    "WILDSFMoW": ("region_0", "region_1", "region_2", "region_3", "region_4", "region_5"),
    "SpawriousO2O_easy": ("Test", "SC_group_1", "SC_group_2"),
    "SpawriousO2O_medium": ("Test", "SC_group_1", "SC_group_2"),
    "SpawriousO2O_hard": ("Test", "SC_group_1", "SC_group_2"),
    "SpawriousM2M_easy": ("Test", "SC_group_1", "SC_group_2"),
    "SpawriousM2M_medium": ("Test", "SC_group_1", "SC_group_2"),
    "SpawriousM2M_hard": ("Test", "SC_group_1", "SC_group_2"),
}

DATASETS = tuple(ENVIRONMENTS)

# Every data set of DomainBed trains for so many steps unless told otherwise.
DEFAULT_STEPS = 5001

# Data sets of 28-pixel images, which DomainBed trains with its MNIST_CNN.
SMALL_IMAGES = ("Debug28", "RotatedMNIST", "ColoredMNIST")
