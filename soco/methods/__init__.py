"""The methods: how each takes a weight apart, under the name it is asked for by."""

from collections.abc import Callable, Mapping

from soco.methods.bases import FisherWeighted, Plain, Scaled, TwoSided, Whitened
from soco.methods.basis_sharing import BasisSharing
from soco.methods.dobi import DobiSVD
from soco.methods.fitted import AASVD, SAESSVD, TFWSVD, AdaSVD
from soco.methods.protocol import (
    Basis,
    FittedMethod,
    Method,
    RankLearner,
    SequentialMethod,
    SharingMethod,
    TrainedMethod,
)
from soco.methods.soco import SoCo
from soco.methods.weighted import (
    ASVD,
    FWSVD,
    KFACSVD,
    SVD,
    SVDLLM,
    SVDLLMV2,
    SVDSurgeonMethod,
)

METHODS: Mapping[str, Callable[..., Method]] = {
    cls.name: cls
    for cls in (
        SVD,
        FWSVD,
        TFWSVD,
        ASVD,
        SVDLLM,
        SVDLLMV2,
        AdaSVD,
        BasisSharing,
        DobiSVD,
        KFACSVD,
        AASVD,
        SAESSVD,
        SVDSurgeonMethod,
        SoCo,
    )
}

__all__ = [
    "AASVD",
    "ASVD",
    "FWSVD",
    "KFACSVD",
    "METHODS",
    "SAESSVD",
    "SVD",
    "SVDLLM",
    "SVDLLMV2",
    "TFWSVD",
    "AdaSVD",
    "Basis",
    "BasisSharing",
    "DobiSVD",
    "FisherWeighted",
    "FittedMethod",
    "Method",
    "Plain",
    "RankLearner",
    "SVDSurgeonMethod",
    "Scaled",
    "SequentialMethod",
    "SharingMethod",
    "SoCo",
    "TrainedMethod",
    "TwoSided",
    "Whitened",
]
