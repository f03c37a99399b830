"""Heatmaps against recorded outputs of the reference's GeneratePoseTarget.

Tolerance 1e-4: what another numpy version changes at border pixels.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from pcan.heatmap import heatmaps
from pcan.skeleton import RELEASED_FLIP_PAIRS, flip_order

GOLDEN = np.load(Path(__file__).parent / "golden" / "heatmap.npz")


def ours(case):
    scaling, sigma = (1.0, 0.6) if case == "noscore" else (0.25, 0.7)
    kp, score = (torch.from_numpy(GOLDEN[f"{case}/{k}"]).float() for k in ("keypoint", "keypoint_score"))
    if case == "noscore":
        score = torch.ones_like(score)
    size = tuple(int(v * scaling + 0.5) for v in GOLDEN[f"{case}/img_shape"])
    return heatmaps(kp * scaling, score, size, sigma).amax(0).transpose(0, 1)  # most of all people; (T,V,h,w)


@pytest.mark.parametrize("case", ["main", "val256", "two_person", "noscore", "fp16", "nonsq_double"])
def test_reference(case):
    H = ours(case)
    if case == "nonsq_double":
        H = torch.cat([H, H.flip(-1)[:, flip_order(RELEASED_FLIP_PAIRS)]])
    ref = torch.from_numpy(GOLDEN[f"{case}/heatmap"])
    assert H.shape == ref.shape
    torch.testing.assert_close(H, ref, rtol=0, atol=1e-4)
    assert torch.equal(H > 0, ref > 0)  # the same windows, to the pixel


def test_batch_is_sample_by_sample():
    g = torch.Generator().manual_seed(0)
    kp, score = torch.rand(3, 4, 28, 2, generator=g) * 30 - 3, torch.rand(3, 4, 28, generator=g)
    together = heatmaps(kp, score, (24, 26), 0.6)
    for b in range(3):
        assert torch.equal(together[b : b + 1], heatmaps(kp[b : b + 1], score[b : b + 1], (24, 26), 0.6))


@pytest.mark.parametrize(
    "xy", [(1e9, 3.0), (-1e9, 3.0), (float("nan"), 3.0), (float("inf"), 3.0), (-3.2, 5.0), (30.0, 30.0)]
)
def test_far_outside_is_empty(xy):
    assert heatmaps(torch.tensor(xy).view(1, 1, 1, 2), torch.ones(1, 1, 1), (16, 16)).sum() == 0


def test_map_smaller_than_a_window():
    H = heatmaps(torch.tensor([[[[1.0, 1.0]]]]), torch.ones(1, 1, 1), (3, 2), 2.0)
    assert H.shape == (1, 1, 1, 3, 2) and (H > 0).all() and H[0, 0, 0, 1, 1] == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_same_on_gpu():
    kp, score = torch.rand(2, 8, 28, 2) * 56, torch.rand(2, 8, 28)
    gpu = heatmaps(kp.cuda(), score.cuda(), (56, 56))
    assert gpu.is_cuda
    torch.testing.assert_close(gpu.cpu(), heatmaps(kp, score, (56, 56)), rtol=0, atol=1e-5)
