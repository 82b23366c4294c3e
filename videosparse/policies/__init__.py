"""The methods: one file each, none knows a model. A new method is a file here and a line in `POLICIES`."""

from videosparse.policies.base import DenseSchedule, LayerPlan, Mode, RunStep, SparsityPolicy
from videosparse.policies.radial import RadialPolicy

POLICIES: dict[str, type[SparsityPolicy]] = {"radial": RadialPolicy}

__all__ = ["POLICIES", "DenseSchedule", "LayerPlan", "Mode", "RadialPolicy", "RunStep", "SparsityPolicy"]
