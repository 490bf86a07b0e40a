"""What a sweep's jobs have in common, imported once: the process that they are forked from loads this module.

Nothing here may start CUDA: a forked process cannot use what its parent has begun there.
"""

import os

# Whether there is a GPU is then asked without starting the driver, should a package that is imported here ask.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

import torch._dynamo  # imported by torch's optimizers at their first step; takes as long as torch itself
import torchvision

from domainbed_sfp.algorithms import registry
from domainbed_sfp.core import provenance
from domainbed_sfp.data import dataset_names
from domainbed_sfp.data.sets.digits import read_embedded
from domainbed_sfp.training.train import train

__all__ = ["torch", "torchvision", "train"]

registry.names()
dataset_names()
read_embedded(None)  # numbers too few for torch to start threads, which a fork would not survive
# The jobs run the code that is loaded now, whatever is edited or checked out while the sweep goes on.
provenance.commit()
