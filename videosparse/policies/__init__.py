"""The methods: one file each, none knows a model. A new method is a file here and a line in `POLICIES`."""

from videosparse.policies.adaspa import AdaSpaPolicy
from videosparse.policies.base import DenseSchedule, LayerPlan, Mode, RunStep, SparsityPolicy
from videosparse.policies.paro import PAROPolicy
from videosparse.policies.radial import RadialPolicy

POLICIES: dict[str, type[SparsityPolicy]] = {"radial": RadialPolicy, "adaspa": AdaSpaPolicy, "paro": PAROPolicy}

__all__ = [
    "POLICIES",
    "AdaSpaPolicy",
    "DenseSchedule",
    "LayerPlan",
    "Mode",
    "PAROPolicy",
    "RadialPolicy",
    "RunStep",
    "SparsityPolicy",
]
