"""Sampling and geometry against the reference's recorded outputs, exactly unless a line says otherwise."""

import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pcan.augment import (
    ClipSpec,
    compact_box,
    crop,
    flip,
    prepare,
    random_box,
    resize,
    sample_dense,
    sample_uniform,
    to_box,
)
from pcan.skeleton import FLIP_PAIRS, RELEASED_FLIP_PAIRS

GOLDEN = Path(__file__).parent / "golden"
SAMPLING, GEOMETRY = np.load(GOLDEN / "sampling.npz"), np.load(GOLDEN / "geometry.npz")
THIN = ClipSpec(
    rgb_frames=4,
    pose_frames=6,
    side=40,
    rgb_size=32,
    pose_size=12,
    sigma=0.6,
    clips_test=1,
    mean=(0,) * 3,
    std=(1,) * 3,
)


def number(key, name):
    return int(next(p for p in key.split("/") if p.startswith(name))[len(name) :])


@pytest.mark.parametrize("kind", ["test", "train", "mm_test", "mm_train", "test_start1"])
def test_sampling(kind):
    keys = [k for k in SAMPLING.files if k.split("/")[0] == kind]
    assert keys
    for k in keys:
        n, clips, test = number(k, "nf"), number(k, "clips"), "test" in kind
        rng = None if test else np.random.RandomState(number(k, "seed"))
        if kind == "mm_train" and k.endswith("Pose"):
            sample_uniform(n, 8, clips, rng=rng)  # RGB is drawn first
        length = (8 if k.endswith("RGB") else 32) if kind.startswith("mm") else number(k, "len")
        ours = sample_uniform(n, length, clips, test, rng).ravel()
        assert np.array_equal(ours + ("start1" in kind), SAMPLING[k]), k  # start1: frames counted from 1


@pytest.mark.parametrize("i,hw_ratio,pad", [(0, 1.0, True), (1, None, True), (2, 1.0, False), (3, (0.8, 1.2), True)])
def test_compaction(i, hw_ratio, pad):
    g = {k.split("/")[1]: GEOMETRY[k] for k in GEOMETRY.files if k.startswith(f"posecompact{i}/")}
    box = compact_box(g["in_kp"], g["img_shape"], hw_ratio=hw_ratio, allow_imgpad=pad)
    assert np.array_equal((box[3] - box[1], box[2] - box[0]), g["out_shape"])
    assert np.array_equal(to_box(g["in_kp"], box, g["out_shape"]), g["out_kp"])
    assert np.array_equal(to_box(g["in_kp"], box, g["out_shape"]), GEOMETRY[f"mmcompact{i}/out_kp"])
    h, w = g["img_shape"]
    assert np.allclose([box[0] / w, box[1] / h, (box[2] - box[0]) / w, (box[3] - box[1]) / h], g["crop_quadruple"])


@pytest.mark.parametrize("i", [0, 3])
def test_compacted_frames(i):
    imgs, shape = GEOMETRY[f"mmcompact{i}/in_imgs"], GEOMETRY[f"posecompact{i}/img_shape"]
    box = compact_box(GEOMETRY[f"posecompact{i}/in_kp"], shape, hw_ratio=1.0 if i == 0 else (0.8, 1.2))
    assert np.array_equal(crop(imgs, box), GEOMETRY[f"mmcompact{i}/out_imgs"])


def test_too_small_a_box_is_the_frame():
    kp = np.zeros((1, 4, 28, 2))
    kp[..., :3, :] = 50 + np.arange(3)[:, None]
    assert compact_box(kp, (90, 80)).tolist() == [0, 0, 80, 90]
    assert compact_box(np.zeros((4, 28, 2)), (90, 80)).tolist() == [0, 0, 80, 90]  # nothing found at all


def test_flip():
    out = flip(GEOMETRY["flip/in_imgs"], GEOMETRY["flip/in_kp"], GEOMETRY["flip/in_score"], RELEASED_FLIP_PAIRS)
    for a, name in zip(out, ("imgs", "kp", "score")):
        assert np.array_equal(a, GEOMETRY[f"flip/out_{name}"]), name


def test_resize():
    out = resize(GEOMETRY["resize/in_imgs"], (256, 256)).reshape(GEOMETRY["resize/out_imgs"].shape)
    assert (
        np.abs(out.astype(int) - GEOMETRY["resize/out_imgs"]).max() <= 1
    )  # grey levels: versions of OpenCV may round differently
    h, w = GEOMETRY["resize/in_imgs"].shape[1:3]
    assert np.allclose(to_box(GEOMETRY["resize/in_kp"], (0, 0, w, h), (256, 256)), GEOMETRY["resize/out_kp"], atol=1e-3)


def test_random_resized_crop():
    np.random.seed(3)
    random.seed(3)  # the reference draws places with Python's generator
    rng = SimpleNamespace(uniform=np.random.uniform, randint=lambda a, b: random.randint(a, b - 1))
    box = random_box((256, 256), (0.56, 1.0), rng=rng)
    assert np.array_equal(box, GEOMETRY["rrc/crop_bbox"])
    assert np.array_equal(crop(GEOMETRY["rrc/in_imgs"], box), GEOMETRY["rrc/out_imgs"])
    assert np.array_equal(
        GEOMETRY["rrc/in_kp"] - box[:2], GEOMETRY["rrc/out_kp"]
    )  # a crop moves missing joints too; their score is 0


def batch(B=3, N=None, spec=THIN, seed=0):
    g, n, S = torch.Generator().manual_seed(seed), (B,) if N is None else (B, N), spec.side
    kp = torch.rand(*n, spec.pose_frames, 28, 3, generator=g) * torch.tensor([S, S, 1.0])
    box = torch.tensor([random_box((S, S), rng=np.random.RandomState(i)).tolist() for i in range(B)]).float()
    return dict(
        rgb=torch.randint(0, 256, (*n, spec.rgb_frames, S, S, 3), generator=g, dtype=torch.uint8),
        keypoint=kp,
        crop=box,
        flip=torch.arange(B) % 2 == 1,
    )


def test_prepare_is_the_reference_chain():
    """Frames within one grey level of OpenCV's crop, resize and flip; heatmaps within 1e-4 of `to_box` and `flip`."""
    b, s, m = batch(), THIN.rgb_size, THIN.pose_size
    rgb, pose = prepare(b, THIN, True)
    from pcan.heatmap import heatmaps

    for i in range(3):
        frames, box = resize(crop(b["rgb"][i].numpy(), b["crop"][i]), (s, s)), b["crop"][i].numpy()
        kp, score = to_box(b["keypoint"][i, ..., :2].numpy(), box, (s, s)), b["keypoint"][i, ..., 2].numpy()
        if b["flip"][i]:
            frames, kp, score = flip(frames, kp, score, FLIP_PAIRS)
        assert np.abs(rgb[i].permute(1, 2, 3, 0).numpy() - frames).max() < 1
        H = heatmaps(torch.tensor(kp)[None] * (m / s), torch.tensor(score)[None], (m, m), THIN.sigma)[0]
        torch.testing.assert_close(pose[i], H, rtol=0, atol=1e-4)


def test_prepare_released_flip_keeps_finger_channels():
    b = {**batch(), "crop": torch.tensor([[0.0, 0, 40, 40]] * 3), "flip": torch.ones(3, dtype=torch.bool)}
    ours, released = prepare(b, THIN, True)[1], prepare(b, replace(THIN, flip_fingers=False), True)[1]
    assert torch.equal(ours[:, :18], released[:, :18])
    assert torch.equal(ours[:, 18:23], released[:, 23:]) and not torch.equal(ours[:, 18:], released[:, 18:])


def test_prepare_many_clips_motion_and_switched_off_streams():
    b = batch(2, 3)
    b["crop"], b["flip"] = torch.tensor([[0.0, 0, 40, 40]] * 2), torch.zeros(2, dtype=torch.bool)
    rgb, pose = prepare(b, replace(THIN, motion=True), False)
    assert rgb.shape == (6, 6, 4, 32, 32) and pose.shape == (6, 28, 6, 12, 12)
    one = prepare({**b, "rgb": b["rgb"][:, 1], "keypoint": b["keypoint"][:, 1]}, THIN, False)
    torch.testing.assert_close(rgb[[1, 4], :3], one[0])
    torch.testing.assert_close(pose[[1, 4]], one[1])
    torch.testing.assert_close(rgb[:, 3:], rgb[:, :3] - rgb[:, :3].mean(2, keepdim=True))
    assert (
        prepare(b, replace(THIN, rgb_frames=0), False)[0] is None
        and prepare(b, replace(THIN, pose_frames=0), False)[1] is None
    )


def test_prepare_leaves_the_batch_alone():
    b = batch()
    before = {k: v.clone() for k, v in b.items()}
    prepare(b, THIN, True)
    assert all(torch.equal(b[k], before[k]) for k in b)


def test_sizes_of_train_and_test():
    released = ClipSpec(test_size=256)
    assert (released.size(True), released.map_size(True), released.size(False), released.map_size(False)) == (
        224,
        56,
        256,
        64,
    )
    assert (ClipSpec().size(False), ClipSpec().map_size(False)) == (224, 56)


def test_unknown_field_fails():
    with pytest.raises(TypeError):
        ClipSpec(rgb_frame=8)


def test_dense_sampling():
    one = sample_dense(60, 16, 2, test=True)[0]
    assert one[0] == 14 and (np.diff(one) == 2).all(), "one clip at the test: the middle"
    many = sample_dense(60, 16, 2, 5, test=True)
    assert many[:, 0].tolist() == [0, 7, 14, 21, 28] and many.max() < 60
    starts = {int(sample_dense(60, 16, 2, rng=np.random.RandomState(i))[0, 0]) for i in range(500)}
    assert starts == set(range(29)), "every start that fits, and no other"
    assert sample_dense(20, 16, 2, test=True)[0].tolist() == [i * 2 % 20 for i in range(16)], "too short: run through again"
    with pytest.raises(ValueError, match="0 frames"):
        sample_dense(0, 8, 2)


def test_joints_are_mirrored_like_heatmaps():
    b, spec = batch(), replace(THIN, pose_as="joints")
    flags = torch.zeros(len(b["flip"]), dtype=torch.bool)
    a, m = (prepare({**b, "flip": f}, spec, True)[1] for f in (flags, ~flags))
    order = list(range(28))
    for i, j in FLIP_PAIRS:
        order[i], order[j] = j, i
    found = a[..., 2] > 0
    assert found.any() and torch.allclose(m[:, :, order][..., 0][found], -a[..., 0][found], atol=1e-5)
    assert torch.allclose(m[:, :, order][..., 1:][found], a[..., 1:][found], atol=1e-5)
    assert not a[~found].any()


def test_impossible_specs():
    with pytest.raises(ValueError, match="pose_as: found 'joint'"):
        ClipSpec(pose_as="joint")
    with pytest.raises(ValueError, match="8 RGB and 32 pose frames"):
        ClipSpec(paired=True)
