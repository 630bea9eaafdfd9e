"""Further views of the batch's images, as the networks saw them."""

from __future__ import annotations

from soteacher.errors import InputError
from soteacher.types import DistillStep, Outputs, Step, View


def student_view(step: Step, view: View) -> Outputs:
    """Return what the network in training makes of a further view.

    Raises:
        InputError: the loop does not give that view.
    """
    if view not in step.views:
        raise InputError(f"this objective reads the view {view!r} of each image: the step must have it in views=...")
    return step.views[view]


def teacher_view(step: DistillStep, view: View) -> Outputs:
    """Return what the teacher makes of a further view; a constant.

    Raises:
        InputError: the loop does not give that view.
    """
    if view not in step.teacher_views:
        raise InputError(
            f"this objective reads the teacher's answer to the view {view!r}: the step must have it in "
            "teacher_views=..."
        )
    return step.teacher_views[view]
