"""Which training data made the model do this.

- :func:`leave_one_out`: for every row, the prediction of the model that did not see it.
"""

from woodbury.influence.leave_one_out import LeaveOneOut, leave_one_out

__all__ = ["LeaveOneOut", "leave_one_out"]
