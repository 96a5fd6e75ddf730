"""A short form of `make soak`: some hundred steps at a high learning rate in mixed precision."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from soak import P, soak

pytestmark = pytest.mark.slow

STEPS = 300


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def report(request):
    return soak(request.param, STEPS, progress=False)


def test_nothing_overflows_but_what_the_scaler_is_for(report):
    assert report.not_finite == 0
    assert (report.skipped > 0) == (report.dtype == "float16")  # a scaler begins too high, and finds its scale
    assert report.skipped < 0.05 * STEPS


def test_proxies_stay_in_the_ball_and_in_use(report):
    assert 0 < report.largest_norm < 100
    assert report.largest_radius < 1
    assert report.ancestors > P / 2


def test_both_losses_fall_again_after_the_data_have_changed(report):
    first, learned, changed, again = report.base
    assert learned < 0.2 * first
    assert changed > 5 * learned
    assert again < 0.2 * changed
    assert report.hier[3] < report.shuffled


def test_memory_does_not_grow(report):
    """Not by the 100 bytes that one number kept in each step would take, and some megabytes of the allocator's."""
    assert report.objects[1] - report.objects[0] < 0.5 * STEPS
    assert report.megabytes[1] - report.megabytes[0] < 20


def test_the_command_prints_the_figures():
    script = Path(__file__).with_name("soak.py")
    command = [sys.executable, "-W", "ignore", script, "--steps", "20", "--dtypes", "float32"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert lines["steps"] == "20"
    assert len(lines["hier"].split()) == 4
