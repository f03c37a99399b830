"The synthetic benchmark: what must never change silently, and what a reader of MA-52's files relies on."
import shutil
from dataclasses import replace

import numpy as np
import pytest

from pcan.files import DataError, load_pickle, read_json, sha256_file
from pcan.synth import SPECS, SPLITS, VERSION, SynthSpec, cast, clip, complete, generate, labels, manifest_of, shares, summary
from pcan.tree import MA52

TINY = SynthSpec("tiny", (8, 3, 4), subjects=8, frames=12, size=(66, 54))
PIN = SynthSpec("pin", (104, 20, 40), seed=3, subjects=20, split="subject", tail=0., floor=0., frames=24, size=(130, 108), amplitude=1.,
                jitter=.02, drop=.03, label_noise=.03, distract=.5, second=.5, grain=2.)   # every knob said: tuning the rows of SPECS moves nothing here
PINNED = {1: ("e5f9e71a5de61db3731b261cca7b259f573cdc827c167b1cc0ec3f3cbb5e3267", {
    ("train", 0): [64.374, 0.088, 0.118, 76.138],
    ("train", 9): [58.152, 0.004, 0.275, 76.119],
    ("train", 50): [55.654, -1.083, 0.33, 81.453],
    ("val", 4): [60.622, -0.675, -6.868, 79.416],
    ("val", 11): [60.88, -0.321, 2.626, 75.665],
    ("test", 3): [61.152, -0.482, -3.539, 77.76],
    ("test", 27): [60.889, -0.014, -0.694, 76.34]})}


def fingerprint(c):
    "Four numbers of a clip's true joints, of the detected ones, and of its first frame."
    w = np.cos(np.arange(c.truth.size)).reshape(c.truth.shape)
    return [float(c.truth.mean()), float(10*(c.truth*w).mean()), float((c.keypoint*w).mean()*10), float(c.score.mean()*100)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("synth")/"tiny"
    return root, generate(TINY, root, workers=1, progress=False)


def test_generator_is_what_its_version_says():
    "If this fails, the generator changed: raise VERSION and pin the new numbers (tolerance .02: machines round differently)."
    assert VERSION in PINNED, "VERSION was raised: pin its numbers here"
    sha, numbers = PINNED[VERSION]
    assert manifest_of(PIN)["sha256"] == sha
    for (split, i), want in numbers.items():
        np.testing.assert_allclose(fingerprint(clip(PIN, split, i, frames=False)), want, atol=.02, err_msg=f"{split} {i}")


def test_clip_does_not_depend_on_the_size_of_the_set():
    more = replace(TINY, counts=(80, 30, 40))
    for split in SPLITS:
        assert labels(TINY, split) == labels(more, split)[:len(labels(TINY, split))]
        a, b = clip(TINY, split, 2), clip(more, split, 2)
        assert a.name == b.name and (a.frames == b.frames).all() and (a.keypoint == b.keypoint).all()


def test_frames_can_be_left_out():
    a, b = clip(TINY, "val", 1), clip(TINY, "val", 1, frames=False)
    assert b.frames is None and (a.keypoint == b.keypoint).all() and (a.score == b.score).all()
    assert a.frames.shape == (12, 66, 54, 3) and a.frames.dtype == np.uint8
    assert a.keypoint.shape == (12, 28, 2) and a.keypoint.dtype == a.score.dtype == np.float32


def test_every_class_and_both_sides_play():
    spec = replace(TINY, counts=(104, 3, 4), tail=0., floor=0., label_noise=0.)
    for i in range(104):
        c = clip(spec, "train", i, frames=False)
        assert np.isfinite(c.truth).all() and c.motion == c.label
    assert sorted(labels(spec, "train")) == sorted(list(range(52))*2)


def test_missing_joints_are_zero_with_score_zero():
    c = clip(replace(TINY, drop=.3), "train", 0, frames=False)
    assert (c.score == 0).any() and (c.keypoint[c.score == 0] == 0).all() and (c.score <= 1).all()


def test_shares_and_tail():
    p = shares(1.05, .006)
    assert abs(p.sum() - 1) < 1e-9 and p.min() >= .006 - 1e-9 and p.argmax() == 9
    s = summary("bench")
    assert s["train"]["rarest"] >= 11 and s["test"]["rarest"] >= 6 and s["train"]["clips"] == 2000
    assert abs(s["test"]["majority_action"] - .115) < .01 and abs(s["test"]["majority_body"] - .40) < .02


def test_wrong_labels_stay_inside_the_body_part_and_in_train():
    spec = replace(SPECS["quick"], label_noise=.2)
    shown = {s: [cast(spec, s, i) for i in range(150)] for s in SPLITS}
    wrong = [(y, m) for _, _, y, m, _ in shown["train"] if y != m]
    assert 15 < len(wrong) < 50 and all(MA52.parents[y] == MA52.parents[m] for y, m in wrong)
    assert all(y == m for s in ("val", "test") for _, _, y, m, _ in shown[s])


def test_people():
    def who(spec, split): return {cast(spec, split, i)[0] for i in range(100)}
    a = {s: who(SPECS["quick"], s) for s in SPLITS}
    assert not (a["train"] & a["val"] or a["train"] & a["test"] or a["val"] & a["test"])
    b = {s: who(replace(SPECS["quick"], split="ma52"), s) for s in SPLITS}
    assert b["train"] & b["val"] and not b["train"] & b["test"]


def test_files(made):
    root, m = made
    assert m["sha256"] == manifest_of(TINY)["sha256"] == read_json(root/"manifest.json")["sha256"]
    lists = {p.name: p.read_text().split("\n")[:-1] for p in (root/"annotations").iterdir()}
    assert len(lists["label_name.txt"]) == 52 and lists["label_name.txt"][0] == "0\tshaking body"
    assert all(line.endswith(" 0") for line in lists["test_list_videos.txt"])
    assert [int(v.split()[1]) for v in lists["test_labels.txt"]] == list(labels(TINY, "test"))
    assert [int(v.split()[1]) for v in lists["train_list_videos.txt"]] == list(labels(TINY, "train"))
    for split, n in zip(SPLITS, TINY.counts):
        rows = load_pickle(root/"MA-52_openpose_28kp"/f"MA52_{split}.pkl")
        assert [r["frame_dir"] + ".mp4" for r in rows] == [v.split()[0] for v in lists[f"{split}_list_videos.txt"]]
        assert rows[0]["keypoint"].shape == (1, 12, 28, 2) and rows[0]["keypoint_score"].shape == (1, 12, 28) and rows[0]["img_shape"] == (66, 54)
        assert split != "test" or not any(r["label"] for r in rows)
        assert len(list((root/"raw_videos"/split).glob("*.mp4"))) == n
    assert all(sha256_file(root/f) == h for f, h in m["files"].items())


def test_video_is_the_clip(made):
    import av
    c = clip(TINY, "val", 1)
    with av.open(str(made[0]/"raw_videos/val"/f"{c.name}.mp4")) as box: film = np.stack([f.to_ndarray(format="rgb24") for f in box.decode(video=0)])
    assert film.shape == c.frames.shape and np.abs(film.astype(float) - c.frames).mean() < 12


def test_goes_on_where_it_stopped_and_any_number_of_workers_gives_the_same(made, tmp_path):
    root = tmp_path/"tiny"
    shutil.copytree(made[0], root)
    (root/"manifest.json").rename(root/"manifest.partial.json")              # as if interrupted before the end
    kept, *lost = sorted((root/"raw_videos/train").iterdir())
    for p in lost: p.unlink()
    stamp = kept.stat().st_mtime_ns
    assert not complete(TINY, root)
    assert generate(TINY, root, workers=2, progress=False) == made[1]        # same fingerprints of every list and pickle
    assert kept.stat().st_mtime_ns == stamp and complete(TINY, root) and not (root/"manifest.partial.json").exists()


def test_refusals(made, tmp_path):
    with pytest.raises(DataError, match="smoke, quick, bench"): generate("huge", tmp_path)
    with pytest.raises(DataError, match="Delete that folder or give another root"): generate(replace(TINY, seed=1), made[0], workers=1)
    (tmp_path/"mine").mkdir(); (tmp_path/"mine"/"thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="give another root"): generate(TINY, tmp_path/"mine", workers=1)
    with pytest.raises(DataError, match="an even size"): SynthSpec("odd", size=(65, 54))
    with pytest.raises(IndexError, match="no dev clip 0"): clip(TINY, "dev", 0)


def test_identity_is_sensitive():
    a = {manifest_of(s)["sha256"] for s in (TINY, replace(TINY, seed=1), replace(TINY, jitter=.05), replace(TINY, counts=(9, 3, 4)))}
    assert len(a) == 4


def test_the_project_reader_takes_it(made):
    from pcan.data import read_split
    for split in SPLITS:
        rows = read_split(made[0], split)
        assert [int(r.label) for r in rows] == list(labels(TINY, split))
        c = clip(TINY, split, 0, frames=False)
        np.testing.assert_allclose(rows[0].keypoint, c.keypoint)


def test_two_processes_make_one_set(tmp_path):
    "On a fresh clone two runs may want the same data at the same moment: one makes it, the other waits."
    import subprocess, sys
    code = ("import sys; from pcan.synth import SynthSpec, generate; "
            "print(generate(SynthSpec('small', (8,4,4), subjects=20, tail=0., frames=8, size=(64,48)), sys.argv[1], workers=1, progress=False)['sha256'])")
    both = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path/"small")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    said = [p.communicate(timeout=120) for p in both]
    assert all(p.returncode==0 for p in both) and len({out for out,_ in said})==1, said
