"""The distillation methods. A new one is a file here, a row in this union and a JSON in configs/."""

from typing import Annotated

from pydantic import Field

from mixkd_fast.methods.base import Method, Moment, Setting
from mixkd_fast.methods.cckd import CCKD
from mixkd_fast.methods.cilda import CILDA
from mixkd_fast.methods.cr_ild import CRILD
from mixkd_fast.methods.data_partition import DataPartition
from mixkd_fast.methods.distillm import DistiLLM
from mixkd_fast.methods.distillm2 import DistiLLM2
from mixkd_fast.methods.dml import DML
from mixkd_fast.methods.dpkd import DPKD
from mixkd_fast.methods.ensemble import Ensemble
from mixkd_fast.methods.finetune import FineTune
from mixkd_fast.methods.gkd import GKD
from mixkd_fast.methods.inheritance import Inheritance
from mixkd_fast.methods.kd import KD
from mixkd_fast.methods.label_revision import LabelRevision
from mixkd_fast.methods.language import LanguageMethod
from mixkd_fast.methods.lm_kd import LanguageKD
from mixkd_fast.methods.minillm import MiniLLM
from mixkd_fast.methods.minilm import MiniLM
from mixkd_fast.methods.miniplm import MiniPLM
from mixkd_fast.methods.mixkd import MixKD
from mixkd_fast.methods.pkd import PKD
from mixkd_fast.methods.pkt import PKT
from mixkd_fast.methods.rdd import RDD
from mixkd_fast.methods.reffakd import ReffAKD

AnyMethod = Annotated[
    CCKD
    | CILDA
    | CRILD
    | DataPartition
    | DistiLLM
    | DistiLLM2
    | DML
    | DPKD
    | Ensemble
    | FineTune
    | GKD
    | Inheritance
    | KD
    | LabelRevision
    | LanguageKD
    | MiniLLM
    | MiniLM
    | MiniPLM
    | MixKD
    | PKD
    | PKT
    | RDD
    | ReffAKD,
    Field(discriminator="name"),
]

__all__ = [
    "CCKD",
    "CILDA",
    "CRILD",
    "DML",
    "DPKD",
    "GKD",
    "KD",
    "PKD",
    "PKT",
    "RDD",
    "AnyMethod",
    "DataPartition",
    "DistiLLM",
    "DistiLLM2",
    "Ensemble",
    "FineTune",
    "Inheritance",
    "LabelRevision",
    "LanguageKD",
    "LanguageMethod",
    "Method",
    "MiniLLM",
    "MiniLM",
    "MiniPLM",
    "MixKD",
    "Moment",
    "ReffAKD",
    "Setting",
]
