"""A budget of experts per token in place of a router's parameter.

`set_budget` finds the main parameter of a router with which a model takes so many experts per
token on average; `sensitivity` and `allocate` split a budget over the layers;
`Router.with_budget` does all of it and reports.
"""

from .layers import allocate, sensitivity, split
from .report import BudgetReport, with_budget
from .setting import BudgetError, Setting, Trial, reach, set_budget

__all__ = [
    "BudgetError",
    "BudgetReport",
    "Setting",
    "Trial",
    "allocate",
    "reach",
    "sensitivity",
    "set_budget",
    "split",
    "with_budget",
]
