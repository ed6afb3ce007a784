"""The distillation methods. A new one is a file here, a row in this union and a JSON in configs/."""

from typing import Annotated

from pydantic import Field

from mixkd_fast.methods.base import Method, Moment, Setting
from mixkd_fast.methods.cckd import CCKD
from mixkd_fast.methods.data_partition import DataPartition
from mixkd_fast.methods.finetune import FineTune
from mixkd_fast.methods.kd import KD
from mixkd_fast.methods.label_revision import LabelRevision
from mixkd_fast.methods.mixkd import MixKD
from mixkd_fast.methods.rdd import RDD

AnyMethod = Annotated[
    FineTune | KD | MixKD | CCKD | LabelRevision | DataPartition | RDD,
    Field(discriminator="name"),
]

__all__ = [
    "CCKD",
    "KD",
    "RDD",
    "AnyMethod",
    "DataPartition",
    "FineTune",
    "LabelRevision",
    "Method",
    "MixKD",
    "Moment",
    "Setting",
]
