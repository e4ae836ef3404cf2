"""Every form of distillation rests where the table says, and the check notices when it does not."""

import pytest
import torch

from steersman.verify import distillation
from steersman.verify.distillation import CHECKS, example


@pytest.mark.parametrize("name", CHECKS)
def test_it_rests_where_it_is_said_to(name):
    row = CHECKS[name](example())
    assert row.holds, f"off by {row.deviation}"


def test_divergences_that_reach_the_teacher_leave_no_distance():
    for name in ("jsd", "skew_kl", "skew_reverse_kl"):
        assert CHECKS[name](example()).gap < 1e-6
    assert CHECKS["forward_kl"](example()).gap > CHECKS["reverse_kl"](example()).gap > 0.1


def test_a_gradient_without_what_is_to_come_is_noticed(monkeypatch):
    monkeypatch.setattr(distillation, "still_to_come", lambda gap, mask, normalised: torch.zeros_like(gap))
    assert not CHECKS["minillm"](example()).holds
    assert not CHECKS["minillm + reward"](example()).holds


def test_the_papers_division_by_length_is_not_that_gradient(monkeypatch):
    own = distillation.still_to_come
    monkeypatch.setattr(distillation, "still_to_come", lambda gap, mask, normalised: own(gap, mask, normalised=True))
    assert CHECKS["minillm"](example()).deviation > 0.05


def test_a_success_shown_to_itself_teaches_at_another_pace(monkeypatch):
    own = distillation.first_success
    monkeypatch.setattr(distillation, "first_success", lambda score, group, least: own(score, group, least, own=True))
    assert CHECKS["reverse_kl, success"](example()).deviation > 0.01
