"""A data set of a few seconds' making: 3 actions, a blob that moves and 28 joints around it."""

import pickle
from pathlib import Path

import numpy as np

from pcan.data import Clip

FRAMES, SIZE = 14, (96, 80)


def frames_and_keypoints(label, seed, T=FRAMES, size=SIZE):
    rng, t = np.random.RandomState(seed), np.arange(T)
    x, y = 36 + rng.rand(T) + (label == 1) * 8 * np.sin(t), 44 + rng.rand(T) + (label == 2) * 8 * np.sin(t)
    fan = np.stack([18 * np.cos(np.arange(28)), 24 * np.sin(np.arange(28))], -1)  # (V,2)
    kp = (np.stack([x, y], -1)[:, None] + fan).astype(np.float32)  # (T,V,2)
    yy, xx = np.mgrid[: size[0], : size[1]]
    blob = np.exp(-((xx - x[:, None, None]) ** 2 + (yy - y[:, None, None]) ** 2) / 200)[..., None]
    return (40 + blob * [200, 120, 60]).astype(np.uint8), kp


def write_video(path, frames, fps=30, **options):
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=options) as out:
        s = out.add_stream("libx264", rate=fps, options=dict(crf="18", preset="veryfast", threads="1"))
        s.height, s.width, s.pix_fmt = *frames.shape[1:3], "yuv420p"
        for f in frames:
            out.mux(s.encode(av.VideoFrame.from_ndarray(f, format="rgb24")))
        out.mux(s.encode())


def write_split(root, split, clips):
    """List and pickle as MA-52 has them; test labels are hidden in the list, as there, and kept in test_labels.txt."""
    ann, kps, test = root / "annotations", root / "MA-52_openpose_28kp", split == "test"
    for folder in (ann, kps):
        folder.mkdir(parents=True, exist_ok=True)
    (ann / f"{split}_list_videos.txt").write_text("".join(f"{c.name}.mp4 {0 if test else c.label}\n" for c in clips))
    if test:
        (ann / "test_labels.txt").write_text("".join(f"{c.name}.mp4 {c.label}\n" for c in clips))
    rows = [
        dict(
            frame_dir=c.name,
            label=0 if test else c.label,
            total_frames=len(c.keypoint),
            img_shape=c.img_shape,
            keypoint=c.keypoint[None],
            keypoint_score=c.score[None],
        )
        for c in clips
    ]
    (kps / f"MA52_{split}.pkl").write_bytes(pickle.dumps(rows, protocol=4))


def tiny_set(root, encode=True, **n):
    """Write the files; `n` clips per split (default 7 train, 3 val, 3 test). Returns the root."""
    root = Path(root)
    for s, (split, k) in enumerate({**dict(train=7, val=3, test=3), **n}.items()):
        clips = []
        for i in range(k):
            frames, kp = frames_and_keypoints(i % 3, 100 * s + i)
            score = np.linspace(0.3, 1, 28, dtype=np.float32) * np.ones((len(kp), 1), np.float32)
            clips.append(
                Clip(
                    f"{s}{i:03d}_01_0001",
                    root / "raw_videos" / split / f"{s}{i:03d}_01_0001.mp4",
                    i % 3,
                    kp,
                    score,
                    frames.shape[1:3],
                )
            )
            if encode:
                write_video(clips[-1].path, frames)
        write_split(root, split, clips)
    return root


def drawn(clip, frames=None):
    """Frames of a tiny clip without its video: a `source` for caches."""
    s, i = int(clip.name[0]), int(clip.name[1:4])
    x = frames_and_keypoints(i % 3, 100 * s + i)[0]
    return x if frames is None else x[frames]
