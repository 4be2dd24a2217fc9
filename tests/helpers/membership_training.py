"""A strategy that says that replicas were lost and joined, for the tests of the monitor and of the report."""

from lightning_curvadion import CurvaDionStrategy
from lightning_curvadion.sync.membership_changes import MembershipChange

# What an elastic run would say, by the step in which it happened.
CHANGES = {
    4: MembershipChange("loss", members=2, lost=1, joined=0, seconds=4.0, skipped=8),
    7: MembershipChange("join", members=4, lost=0, joined=2, seconds=2.0),
    9: MembershipChange("loss", members=4, lost=1, joined=1, seconds=6.0, skipped=16),
}


class ChangingStrategy(CurvaDionStrategy):
    """Its replicas stay the same, whatever it says."""

    def __init__(self, changes: dict[int, MembershipChange] = CHANGES) -> None:
        super().__init__()
        self._planned = changes
        # The wait for the first group costs no training.
        self.membership_changes = [MembershipChange("start", members=3, lost=0, joined=0, seconds=9.0)]

    def optimizer_step(self, *args, **options):
        assert self.lightning_module is not None
        if (step := self.lightning_module.trainer.global_step) in self._planned:
            self.membership_changes.append(self._planned[step])
        return super().optimizer_step(*args, **options)
