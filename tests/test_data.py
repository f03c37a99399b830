"""The reader: what it gives, that it gives the same again, and what it says when something is wrong."""

import os
import pickle
import shutil
import sys
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tinyset import FRAMES, drawn, frames_and_keypoints, tiny_set, write_video

from pcan import clips
from pcan.augment import ClipSpec, prepare
from pcan.clips import Clips, build_cache, cache_path, loader
from pcan.data import manifest_sha, read_keypoints, read_list, read_split
from pcan.files import DataError, write_json
from pcan.synth import SynthSpec, generate
from pcan.tree import MA52
from pcan.validation import validate
from pcan.video import person_frames, video

SPEC = ClipSpec(rgb_frames=4, pose_frames=6, side=40, rgb_size=32, pose_size=12, sigma=0.6, clips_test=2)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tiny_set(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture
def tiny(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "tiny"))


def listed(root, split="train"):
    return root / "annotations" / f"{split}_list_videos.txt"


def pickled(root, split="train"):
    return root / "MA-52_openpose_28kp" / f"MA52_{split}.pkl"


def first_video(root):
    return read_split(root, "train")[0].path


def edit(root, change, split="train"):
    """Rewrite a split's pickle after `change(rows)`."""
    rows = pickle.loads(pickled(root, split).read_bytes())
    pickled(root, split).write_bytes(pickle.dumps(change(rows) or rows))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)


# ---- what is read


def test_split(tiny):
    clips = read_split(tiny, "train")
    assert [c.label for c in clips] == [0, 1, 2, 0, 1, 2, 0] and clips[1].name == "0001_01_0001"
    assert clips[1].keypoint.shape == (FRAMES, 28, 2) and clips[1].keypoint.dtype == np.float32
    assert np.array_equal(clips[1].keypoint, frames_and_keypoints(1, 1)[1]) and clips[1].img_shape == (96, 80)


def test_frames_survive_the_video(tiny):
    frames = video(read_split(tiny, "train")[1])
    assert frames.shape == (FRAMES, 96, 80, 3) and np.abs(frames.astype(int) - frames_and_keypoints(1, 1)[0]).mean() < 3


def test_hidden_labels(tiny):
    assert [c.label for c in read_split(tiny, "test")] == [0, 1, 2]
    (tiny / "annotations" / "test_labels.txt").unlink()
    assert [c.label for c in read_split(tiny, "test")] == [-1] * 3 and listed(tiny, "test").read_text().split()[
        1::2
    ] == ["0"] * 3


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: {"split": {"train": []}, "annotations": rows},
        lambda rows: [{**r, "frame_dir": r["frame_dir"] + ".mp4"} for r in rows],
        lambda rows: [
            {**{k: v for k, v in r.items() if k != "frame_dir"}, "filename": "train/" + r["frame_dir"] + ".mp4"}
            for r in rows
        ],
    ],
)
def test_spellings_of_pickles(tiny, change):
    before = read_split(tiny, "train")
    edit(tiny, change)
    assert all(np.array_equal(a.keypoint, b.keypoint) for a, b in zip(before, read_split(tiny, "train")))


def test_best_person(tiny):
    def add(rows):
        r = rows[0]
        r["keypoint"], r["keypoint_score"] = (
            np.concatenate([r["keypoint"] * 0 + 1, r["keypoint"]]),
            np.concatenate([r["keypoint_score"] * 0.5, r["keypoint_score"]]),
        )

    before = read_split(tiny, "train")[0]
    edit(tiny, add)
    after = read_split(tiny, "train")[0]
    assert np.array_equal(before.keypoint, after.keypoint) and np.array_equal(before.score, after.score)


def test_pyav_reads_the_same(tiny, monkeypatch):
    clip = read_split(tiny, "train")[1]
    by_decord = video(clip)
    monkeypatch.setitem(sys.modules, "decord", None)
    by_av = video(clip, [2, 2, 9])
    assert (
        by_av.shape == (3, 96, 80, 3) and np.abs(by_av.astype(int) - by_decord[[2, 2, 9]]).max() <= 3
    )  # grey levels: another YUV conversion


def test_a_video_of_another_size_than_its_keypoints(tiny):
    clip = read_split(tiny, "train")[1]
    big = lambda c, i: drawn(c, i).repeat(2, 1).repeat(2, 2)
    assert np.abs(person_frames(clip, SPEC, None, big).astype(int) - person_frames(clip, SPEC, None, drawn)).mean() < 2


# ---- bad input: the message names the file, what was found and what was expected


def raises(call, *words):
    with pytest.raises(DataError) as e:
        call()
    for w in words:
        assert w in str(e.value), (w, str(e.value))


def test_no_folder(tmp_path):
    raises(lambda: read_split(tmp_path / "none", "train"), "train_list_videos.txt", "no such file", "pcan_synth")
    raises(lambda: validate(tmp_path / "none"), "none", "no such folder")
    raises(lambda: manifest_sha(tmp_path), "manifest.json")


def test_unknown_split(tiny):
    raises(lambda: read_split(tiny, "valid"), "'valid'", "train, val, test")


@pytest.mark.parametrize(
    "text,words",
    [
        ("a.mp4\n", ("line 1", "'a.mp4'", "its label")),
        ("a.mp4 3\nb.mp4 52\n", ("line 2", "0 to 51")),
        ("a.mp4 -1\n", ("line 1",)),
        ("a.mp4 x\n", ("line 1", "its label")),
        ("a.mp4 3\na.mp4 4\n", ("line 2", "once")),
        ("", ("no video", "one per line")),
        ("\n\n", ("no video",)),
    ],
)
def test_bad_list(tmp_path, text, words):
    (tmp_path / "list.txt").write_text(text)
    raises(lambda: read_list(tmp_path / "list.txt"), "list.txt", *words)


@pytest.mark.parametrize(
    "change,words",
    [
        (
            lambda r: dict(keypoint=r["keypoint"][:, :, :17], keypoint_score=r["keypoint_score"][:, :, :17]),
            ("[1, 14, 17, 2]", "28 joints"),
        ),
        (lambda r: dict(keypoint=r["keypoint"][0]), ("[14, 28, 2]", "28 joints")),
        (lambda r: dict(keypoint=np.where(np.arange(28)[:, None] == 3, np.nan, r["keypoint"])), ("NaN", "score 0")),
        (lambda r: dict(keypoint=r["keypoint"][:, :0]), ("[1, 0, 28, 2]",)),
        (
            lambda r: dict(keypoint_score=r["keypoint_score"][:, :5]),
            ("scores of shape [1, 5, 28]", "one score per joint"),
        ),
        (lambda r: dict(total_frames=99), ("14 frames", "99")),
    ],
)
def test_bad_keypoints(tiny, change, words):
    edit(tiny, lambda rows: [{**rows[0], **change(rows[0])}, *rows[1:]])
    raises(lambda: read_split(tiny, "train"), "MA52_train.pkl", "0000_01_0001", *words)


@pytest.mark.parametrize(
    "rows,words",
    [
        ({"clips": []}, ("['clips']", "annotations")),
        (7, ("int", "list of dicts")),
        ([3], ("entry 0", "frame_dir")),
        ([{"label": 1}], ("entry 0", "frame_dir")),
        ([{"frame_dir": "0000_01_0001", "label": 1}], ("'keypoint'",)),
        ([], ("0000_01_0001", "one entry per video listed")),
    ],
)
def test_other_pickles(tiny, rows, words):
    edit(tiny, lambda _: rows)
    if rows == []:
        pickled(tiny).write_bytes(pickle.dumps([]))
    raises(lambda: read_split(tiny, "train"), "MA52_train.pkl", *words)


def test_truncated_pickle(tiny):
    pickled(tiny).write_bytes(pickled(tiny).read_bytes()[:-100])
    raises(lambda: read_split(tiny, "train"), "MA52_train.pkl", "cut short")


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_pickle_that_would_run_code(tiny, tmp_path):
    pickled(tiny).write_bytes(pickle.dumps([Evil(tmp_path / "ran")]))
    raises(lambda: read_split(tiny, "train"), "MA52_train.pkl", "system")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content",
    [lambda b: b"", lambda b: b"not a video at all", lambda b: b[: len(b) // 2]],
    ids=["empty", "garbage", "truncated"],
)
@pytest.mark.parametrize("reader", ["decord", "av"])
def test_broken_video(tiny, content, reader, monkeypatch, capfd):
    if reader == "av":
        monkeypatch.setitem(sys.modules, "decord", None)
    path = first_video(tiny)
    path.write_bytes(content(path.read_bytes()))
    raises(lambda: video(read_split(tiny, "train")[0]), path.name, "again")
    raises(lambda: Clips(tiny, "train", replace(SPEC, cache=False))[0], path.name)
    assert "ERROR" not in capfd.readouterr().err  # decord's own cry would say it twice


def test_video_cut_in_its_data(tiny, tmp_path):
    """An index in front and half of the data: opens, then breaks."""
    path = first_video(tiny)
    write_video(
        tmp_path / "x.mp4",
        np.random.RandomState(0).randint(0, 255, (FRAMES, 96, 80, 3), np.uint8),
        movflags="faststart",
    )
    whole = (tmp_path / "x.mp4").read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    raises(lambda: video(read_split(tiny, "train")[0]), path.name)


def test_missing_video(tiny):
    path = first_video(tiny)
    path.unlink()
    raises(lambda: video(read_split(tiny, "train")[0]), path.name, "no such video")
    raises(lambda: build_cache(tiny, "train", SPEC, folder=tiny / "c", workers=1), path.name)
    raises(
        lambda: build_cache(tiny, "train", SPEC, folder=tiny / "c", workers=2), path.name
    )  # from another process too


@pytest.mark.parametrize("extra,fine", [(0, True), (2, True), (3, False)])
def test_fewer_frames_than_keypoints(tiny, extra, fine):
    more = lambda x: np.concatenate([x, *[x[:, -1:]] * extra], 1)
    edit(
        tiny,
        lambda rows: [
            {
                **rows[0],
                "keypoint": more(rows[0]["keypoint"]),
                "keypoint_score": more(rows[0]["keypoint_score"]),
                "total_frames": FRAMES + extra,
            },
            *rows[1:],
        ],
    )
    clip = read_split(tiny, "train")[0]
    if not fine:
        return raises(lambda: video(clip), "found 14 frames", "expected 17")
    frames = video(clip)
    assert len(frames) == FRAMES + extra and all(np.array_equal(f, frames[FRAMES - 1]) for f in frames[FRAMES:])


# ---- the cache


def fill(root, folder, log):
    def source(clip, frames):
        with open(log, "a") as f:
            f.write(clip.name + "\n")
        return drawn(clip, frames)

    build_cache(root, "train", SPEC, source, workers=1, folder=folder)


def test_cache_holds_the_crops(tiny, tmp_path):
    clips = read_split(tiny, "train")
    one, two = (
        np.load(build_cache(tiny, "train", SPEC, workers=w, folder=tmp_path / str(w)) / "rgb.npy") for w in (1, 2)
    )
    assert np.array_equal(one, two) and one.shape == (7 * FRAMES, 40, 40, 3)
    assert all(np.array_equal(one[i * FRAMES : (i + 1) * FRAMES], person_frames(c, SPEC)) for i, c in enumerate(clips))
    assert not list(tmp_path.glob("1/*.part")) and not list(tmp_path.glob("1/*/done.npy"))


@pytest.mark.parametrize("touch", ["video", "list", "pickle", "manifest"])
def test_cache_follows_its_source(tiny, tmp_path, touch):
    log = tmp_path / "log"
    if touch == "manifest":
        write_json(tiny / "manifest.json", dict(seed=0))
    for _ in range(2):
        fill(tiny, tmp_path / "c", log)
    assert len(log.read_text().split()) == 7  # the second time there was nothing to do
    if touch == "video":
        first_video(tiny).write_bytes(b"another")
    if touch == "list":
        listed(tiny).write_text("".join(listed(tiny).read_text().splitlines(True)[1:]))
    if touch == "pickle":
        edit(tiny, lambda rows: rows[:-1] + [{**rows[-1], "note": "x"}])
    if touch == "manifest":
        write_json(tiny / "manifest.json", dict(seed=1))
    fill(tiny, tmp_path / "c", log)
    assert len(log.read_text().split()) == (13 if touch == "list" else 14)
    assert len(list((tmp_path / "c").glob("*/rgb.npy"))) == 1  # the stale one is gone


def test_cache_needs_no_video(tmp_path):
    root = tiny_set(tmp_path / "tiny", encode=False)
    write_json(root / "manifest.json", dict(seed=0))
    frames = iter([drawn(c) for c in read_split(root, "train")])  # in the list's order
    build_cache(root, "train", SPEC, lambda clip, _: next(frames), workers=1, folder=tmp_path / "c")
    item = Clips(root, "train", SPEC, train=True, folder=tmp_path / "c")[3]
    assert item["rgb"].float().std() > 5


def test_cache_goes_on_after_an_interruption(tiny, tmp_path):
    seen = []

    def source(clip, frames):
        if len(seen) == 4:
            seen.append("stop")
            raise KeyboardInterrupt
        seen.append(clip.name)
        return drawn(clip, frames)

    with pytest.raises(KeyboardInterrupt):
        build_cache(tiny, "train", SPEC, source, workers=1, folder=tmp_path / "c")
    assert not cache_path(
        tiny, "train", SPEC, tmp_path / "c"
    ).exists()  # nothing half done where a whole one is expected
    place = build_cache(tiny, "train", SPEC, source, workers=1, folder=tmp_path / "c")
    names = [s for s in seen if s != "stop"]
    assert sorted(names) == sorted(set(names)) and len(names) == 7  # no clip twice
    clips = read_split(tiny, "train")
    assert np.array_equal(
        np.load(place / "rgb.npy"), np.concatenate([person_frames(c, SPEC, None, drawn) for c in clips])
    )


def test_two_builders_do_the_work_once(tiny, tmp_path):
    both = [get_context("fork").Process(target=fill, args=(tiny, tmp_path / "c", tmp_path / "log")) for _ in range(2)]
    for p in both:
        p.start()
    for p in both:
        p.join()
    assert [p.exitcode for p in both] == [0, 0] and len((tmp_path / "log").read_text().split()) == 7


def test_frames_that_do_not_fit_the_keypoints(tiny, tmp_path):
    raises(
        lambda: build_cache(tiny, "train", SPEC, lambda c, _: drawn(c)[:5], workers=1, folder=tmp_path),
        "found 5 frames",
        "expected 14",
    )


def test_no_room(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(clips.shutil, "disk_usage", lambda p: SimpleNamespace(free=1000))
    raises(lambda: build_cache(tiny, "train", SPEC, folder=tmp_path), "GiB free", "cache=False")


# ---- items and batches


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def test_item(made, folder):
    item = Clips(made, "train", SPEC, train=True, folder=folder)[2]
    assert item["rgb"].shape == (4, 40, 40, 3) and item["rgb"].dtype == torch.uint8
    assert item["keypoint"].shape == (6, 28, 3) and item["keypoint"].dtype == torch.float32
    assert (
        item["crop"].shape == (4,)
        and item["crop"].dtype == torch.float32
        and (item["label"], item["index"]) == (2, 2)
        and isinstance(item["flip"], bool)
    )


def test_cached_or_decoded(made, folder):
    a, b = (Clips(made, "train", replace(SPEC, cache=c), train=True, seed=3, folder=folder) for c in (True, False))
    assert all(same(a[i], b[i]) for i in range(len(a)))


def test_seeds(made, folder):
    one, two = (Clips(made, "train", SPEC, train=True, seed=s, folder=folder) for s in (0, 1))
    first = [one[i] for i in range(7)]
    assert not any(same(a, two[i]) for i, a in enumerate(first))
    one.set_epoch(4)
    assert not any(same(a, one[i]) for i, a in enumerate(first))
    one.set_epoch(0)
    assert all(same(a, one[i]) for i, a in enumerate(first)) and len({tuple(a["crop"].tolist()) for a in first}) > 3


def test_workers_change_nothing(made, folder):
    clips = Clips(made, "train", SPEC, train=True, folder=folder)
    for epoch in (0, 1):
        clips.set_epoch(epoch)
        runs = [list(loader(clips, 3, workers=w)) for w in (0, 2)]
        assert len(runs[0]) == len(runs[1]) == 2 and all(
            same(a, b) for a, b in zip(*runs)
        )  # 7 clips: the last one is left out


def test_loader_leaves_the_global_generators_alone(made, folder):
    clips = Clips(made, "train", SPEC, train=True, folder=folder)
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    list(loader(clips, 3))
    assert torch.equal(before[0], torch.get_rng_state()) and np.array_equal(before[1], np.random.get_state()[1])


def test_order(made, folder):
    clips = Clips(made, "train", SPEC, train=True, folder=folder)
    order = lambda: torch.cat([b["index"] for b in loader(clips, 3, train=True)]).tolist()
    first = order()
    clips.set_epoch(1)
    assert order() != first
    clips.set_epoch(0)
    assert order() == first
    assert torch.cat([b["index"] for b in loader(clips, 3, train=False)]).tolist() == list(range(7))


def test_clips_at_test(made, folder):
    clips = Clips(made, "val", SPEC, folder=folder)
    batch = next(iter(loader(clips, 2)))
    assert (
        batch["rgb"].shape == (2, 2, 4, 40, 40, 3)
        and batch["keypoint"].shape == (2, 2, 6, 28, 3)
        and not batch["flip"].any()
    )
    rgb, pose = prepare(batch, SPEC, train=False)
    assert rgb.shape == (4, 3, 4, 32, 32) and pose.shape == (4, 28, 6, 12, 12)
    clips.set_epoch(9)
    assert same(batch, next(iter(loader(clips, 2, workers=1))))  # nothing random at test


@pytest.mark.parametrize("off", ["rgb_frames", "pose_frames"])
def test_one_stream(made, folder, off):
    spec = replace(SPEC, **{off: 0})
    batch = next(iter(loader(Clips(made, "train", spec, train=True, folder=folder), 2)))
    rgb, pose = prepare(batch, spec, True)
    assert (rgb is None) == (off == "rgb_frames") and (pose is None) == (off == "pose_frames")


def test_pose_alone_needs_no_video(tmp_path):
    root = tiny_set(tmp_path / "tiny", encode=False)
    assert Clips(root, "train", replace(SPEC, rgb_frames=0), train=True, folder=tmp_path)[0]["keypoint"].shape == (
        6,
        28,
        3,
    )
    assert not list(tmp_path.glob("tiny-*"))


# ---- validate, fingerprints


def test_validate_whole(made):
    report = validate(made, workers=1)
    assert (
        report.ok
        and not report.notes
        and report.clips == dict(train=7, val=3, test=3)
        and report.counts["train"][:3].tolist() == [3, 2, 2]
    )
    assert "7 clips" in str(report) and "0 problems" in str(report)


def test_validate_finds_everything(tiny):
    clips = read_split(tiny, "train")
    clips[0].path.unlink()
    clips[1].path.write_bytes(b"")
    (tiny / "raw_videos" / "train" / "spare.mp4").write_bytes(b"")
    with open(listed(tiny), "a") as f:
        f.write("nolabel.mp4\nbig.mp4 77\n")

    def change(rows):
        rows[2]["keypoint"] = rows[2]["keypoint"] * np.nan
        rows[3]["keypoint"], rows[3]["keypoint_score"] = (
            rows[3]["keypoint"][:, :, :9],
            rows[3]["keypoint_score"][:, :, :9],
        )
        rows[4]["keypoint"] = rows[4]["keypoint"] + 500
        rows.pop()

    edit(tiny, change)
    pickled(tiny, "val").write_bytes(b"\x80")
    report = validate(tiny, workers=1)
    text = str(report)
    for words in (
        "line 8",
        "line 9",
        "NaN",
        "[1, 14, 9, 2]",
        "no usable keypoints of 0006_01_0001",
        "0000_01_0001.mp4: no such video",
        "0001_01_0001.mp4: not readable",
        "spare.mp4: not in the list",
        "0004_01_0001: 100% of the joints",
        "MA52_val.pkl",
    ):
        assert words in text, words
    assert not report.ok and "val" not in report.clips


def test_fingerprint(tiny):
    a = manifest_sha(tiny)
    first_video(tiny).touch()
    assert manifest_sha(tiny) == a and len(a) == 64  # the same on another machine
    listed(tiny).write_text(listed(tiny).read_text().replace(" 1\n", " 2\n"))
    assert manifest_sha(tiny) != a
    write_json(tiny / "manifest.json", dict(seed=0))
    assert manifest_sha(tiny) != a
    assert read_keypoints(pickled(tiny)).keys() == read_list(listed(tiny)).keys()


def test_names_of_another_data_set(tiny):
    names = tiny / "annotations" / "label_name.txt"
    names.write_text("".join(f"{k}\t{a}\r\n" for k, a in enumerate(MA52.actions)))
    assert validate(tiny, workers=1).ok
    names.write_text("".join(f"{k}\t{a}\n" for k, a in enumerate(("sneezing",) + MA52.actions[1:])))
    assert any("'sneezing'" in p and "'shaking body'" in p for p in validate(tiny, workers=1).problems)


def test_caches_have_a_limit(tmp_path, monkeypatch):
    "A cache that would pass `PCAN_CACHE_GIB` is not begun; the message names the one that was unused for longest."
    small = SynthSpec("small", (12,4,4), subjects=20, tail=0., frames=8, size=(96,96))
    toy = tmp_path/"small"; generate(small, toy, workers=1, progress=False)
    spec = ClipSpec(side=36, rgb_size=32, pose_size=12)
    first = build_cache(toy, "val", spec, folder=tmp_path/"cache", workers=1, progress=False)
    monkeypatch.setenv("PCAN_CACHE_GIB", str(first.joinpath("rgb.npy").stat().st_size*1.5/2**30))
    with pytest.raises(DataError, match=f"PCAN_CACHE_GIB.*{first.name}"): build_cache(toy, "test", spec, folder=tmp_path/"cache", workers=1, progress=False)
    assert build_cache(toy, "val", spec, folder=tmp_path/"cache", workers=1)==first, "what is there is read"
    monkeypatch.delenv("PCAN_CACHE_GIB")
    assert build_cache(toy, "test", spec, folder=tmp_path/"cache", workers=1, progress=False).is_dir()
