"""A tiny store of all stages, with files as real runs write them, and ways to damage it."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from heapr import artifacts
from heapr.artifacts import CHECKPOINT, CHECKPOINT_PART, MANIFEST, REPAIR_PART
from heapr.origin import Origin
from heapr.sealed import read_sealed, sealed_text
from heapr.store import Artifact, Store
from heapr.types import Evaluation, LayerStatistics, Plan, Pruning, Scores, Statistics, TokenWindows

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Made:
    """An artifact or a part of the tiny store, and how its files are written."""

    origin: Origin
    part: str
    write: Callable[[Path, None], None]


def nothing() -> None:
    """The value of an artifact whose files hold nothing of it."""


def tiny_steps(seed: int) -> list[Made]:
    """All artifacts and parts of one experiment, in order."""
    generator = torch.Generator().manual_seed(seed)
    values_EF = torch.rand(2, 3, generator=generator)
    layer = LayerStatistics.zeros(2, 3, CPU)
    layer.h_sq_sum_EF.copy_(values_EF)
    statistics = Statistics({1: layer}, num_tokens=8, num_predicted_tokens=6, loss_sum=1.5 + seed)
    tokens = TokenWindows(torch.randint(0, 9, (2, 4), generator=generator))
    plan = Plan({1: values_EF > values_EF.min()})
    repaired = Pruning(plan, {1: {"down_proj": torch.rand(plan.num_kept, 4, generator=generator)}})
    calibrate = Origin(
        "calibrate", 1, {"seed": seed, "share": 0.1, "num_samples": 2, "sequence_length": 4}, {}
    )
    score = Origin("score", 1, {"criterion": {"name": "heapr"}}, {"calibrate": calibrate.key})
    prune = Origin("prune", 1, {"ratio": 0.2}, {"score": score.key})
    evaluate = Origin("evaluate", 1, {"evaluator": {}}, {"prune": prune.key})
    report = {"summary": [], "not_reached": [], "seed": seed}

    def write_plan(folder: Path, _: None) -> None:
        artifacts.write_plan(folder, (plan, report), model={"sha256": "0"}, is_repaired=True)

    def write_checkpoint(folder: Path, _: None) -> None:
        inside = folder / CHECKPOINT / artifacts.PLANS
        inside.mkdir(parents=True)
        artifacts.write_plan(inside, (plan, report), model={"sha256": "0"}, is_repaired=False)
        (inside / artifacts.ALLOCATION).unlink()
        (folder / CHECKPOINT / "config.json").write_text(json.dumps({"seed": seed}))
        (folder / CHECKPOINT / artifacts.CARD).write_text(f"# Model {seed}\n")

    def write_repair(folder: Path, _: None) -> None:
        artifacts.write_repair(folder, (repaired, report), plan_folder=folder.parent / prune.key)

    scores = Scores({1: values_EF})
    evaluation = Evaluation({"perplexity/it": 2.0 + seed}, {"list": [seed]})
    return [
        Made(calibrate, "", lambda folder, _: artifacts.write_calibration(folder, (tokens, statistics))),
        Made(score, "", lambda folder, _: artifacts.write_scores(folder, scores)),
        Made(prune, "", write_plan),
        Made(prune, REPAIR_PART, write_repair),
        Made(prune, CHECKPOINT_PART, write_checkpoint),
        Made(evaluate, "", lambda folder, _: artifacts.write_evaluation(folder, evaluation)),
    ]


STEPS = [*tiny_steps(0), *tiny_steps(1)]


def make_all(root: Path) -> list[Artifact]:
    """Go through all steps, as runs do."""
    store = Store(root, CPU)
    return [store.get(step.origin, nothing, step.write, step.part) for step in STEPS]


def data_of(root: Path) -> dict[str, bytes]:
    """Contents of all files of artifacts, without manifests, which say when they were made."""
    found = {}
    for path in sorted(root.glob("[!.]*/[!.]*/**/*")):
        assert not path.is_symlink(), path
        if path.is_file() and path.name != MANIFEST:
            found[str(path.relative_to(root))] = path.read_bytes()
    return found


class Damage:
    """One way or another to damage a store, chosen by a seed.

    Args:
        root: of the store.
        seed: of every choice.
    """

    def __init__(self, root: Path, seed: int) -> None:
        self.random = random.Random(seed)
        self.root = root
        self.path = self.random.choice(sorted(root.glob("[!.]*/[!.]*")))
        same_stage = sorted(self.path.parent.glob("[!.]*"))
        self.other = next(path for path in same_stage if path != self.path)
        self.files = [path for path in sorted(self.path.rglob("*")) if path.is_file()]
        self.file = self.random.choice(self.files)

    def flip_a_bit(self) -> None:
        content = bytearray(self.file.read_bytes())
        content[self.random.randrange(len(content))] ^= 1 << self.random.randrange(8)
        self.file.write_bytes(content)

    def flip_a_bit_and_restore_the_time(self) -> None:
        times = self.file.stat()
        self.flip_a_bit()
        os.utime(self.file, ns=(times.st_atime_ns, times.st_mtime_ns))

    def truncate(self) -> None:
        os.truncate(self.file, self.random.randrange(self.file.stat().st_size))

    def append(self) -> None:
        with self.file.open("ab") as file:
            file.write(self.random.randbytes(self.random.randrange(1, 9)))

    def remove_a_file(self) -> None:
        self.file.unlink()

    def add_a_file(self) -> None:
        folder = self.random.choice([self.path, self.file.parent])
        (folder / self.random.choice(["notes.txt", "model.safetensors", ".hidden", "x.py"])).write_text("x")

    def add_a_folder(self) -> None:
        (self.path / "empty").mkdir()

    def file_becomes_a_link(self) -> None:
        copy = self.root / f".copy-{self.file.name}"
        self.file.rename(copy)
        self.file.symlink_to(copy)

    def file_becomes_a_folder(self) -> None:
        self.file.unlink()
        self.file.mkdir()

    def swap_files(self) -> None:
        """Between two artifacts of a stage."""
        name = self.random.choice([file for file in self.files if file.name != "config.json"])
        twin = self.other / name.relative_to(self.path)
        mine, theirs = name.read_bytes(), twin.read_bytes()
        if mine == theirs:  # such as two reports that say nothing
            return self.flip_a_bit()
        name.write_bytes(theirs)
        return twin.write_bytes(mine) and None

    def swap_folders(self) -> None:
        aside = self.root / ".aside"
        self.path.rename(aside)
        self.other.rename(self.path)
        aside.rename(self.other)

    def folder_becomes_a_link(self) -> None:
        shutil.rmtree(self.path)
        self.path.symlink_to(self.other)

    def folder_becomes_a_link_to_itself(self) -> None:
        elsewhere = self.root / ".elsewhere"
        self.path.rename(elsewhere)
        self.path.symlink_to(elsewhere)

    def folder_becomes_a_file(self) -> None:
        shutil.rmtree(self.path)
        self.path.write_text("x")

    def folder_of_another_stage(self) -> None:
        stages = [path for path in self.root.glob("[!.]*") if path != self.path.parent]
        chosen = self.random.choice(sorted(stages))
        shutil.rmtree(self.path)
        shutil.copytree(sorted(chosen.glob("[!.]*"))[0], self.path)

    def manifest_is_nonsense(self) -> None:
        text = self.random.choice(
            [b"", b"null", b"[]", b"{", b'"x"', b"17", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 50_000, b"{}"]
        )
        (self.path / MANIFEST).write_bytes(text)

    def edit_manifest(self) -> None:
        """Change, or remove, one of its fields."""
        manifest = json.loads((self.path / MANIFEST).read_text())
        name = self.random.choice(list(manifest))
        new = self.random.choice([None, 0, -1, "x", [], {}, 2**70, True, 0.5, {"a": 1}, "remove"])
        if new == "remove" or new == manifest[name]:
            del manifest[name]
        else:
            manifest[name] = new
        (self.path / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")

    def edit_and_seal_manifest(self) -> None:
        """The same with a checksum that fits, in one of the fields that files and requests answer for."""
        manifest = read_sealed(self.path / MANIFEST)
        name = self.random.choice(["stage", "stage_version", "key", "config", "upstream", "files"])
        for value in self.random.sample([None, 2, "evaluate", [], {}, {"a": 1}, "0" * 16, True, "remove"], 9):
            if value != manifest[name]:
                break
        manifest[name] = value
        if value == "remove":
            del manifest[name]
        (self.path / MANIFEST).write_text(sealed_text(manifest))

    def edit_and_seal_a_file_entry(self) -> None:
        manifest = read_sealed(self.path / MANIFEST)
        files = manifest["files"]
        name = self.random.choice(sorted(files))
        wrong = [
            {"size": -1}, {"size": files[name]["size"] + 1}, {"size": 1.5}, {"size": "1"}, {"size": None},
            {"sha256": "0" * 64}, {"sha256": "x"}, {"sha256": None}, {"sha256": []},
        ]  # fmt: skip
        files[name] |= self.random.choice(wrong)
        (self.path / MANIFEST).write_text(sealed_text(manifest))

    def edit_and_seal_names_of_files(self) -> None:
        manifest = read_sealed(self.path / MANIFEST)
        files = manifest["files"]
        name = self.random.choice(sorted(files))
        entry = files.pop(name)
        new = self.random.choice(
            [
                "",
                ".",
                "..",
                f"../{self.path.name}/{name}",
                str(self.path / name),
                "a\0b",
                f"./{name}",
                "x",
                None,
            ]
        )
        if new is not None:  # else the entry is gone, and the file stays
            files[new] = entry
        (self.path / MANIFEST).write_text(sealed_text(manifest))

    def manifest_of_another(self) -> None:
        shutil.copy(self.other / MANIFEST, self.path / MANIFEST)

    def remove_the_manifest(self) -> None:
        (self.path / MANIFEST).unlink()


# By name, in the order of the class.
KINDS = [name for name in vars(Damage) if not name.startswith("_")]


def damaged_copies(root: Path) -> list[Path]:
    return [path for path in root.glob("*/.*.damaged-*") if not path.name.startswith("..")]


def check_damage(pristine: Path, root: Path, kind: str, seed: int) -> None:
    """Damage a copy of a store, and check that this is found, kept, and made good."""
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(pristine, root, symlinks=True)
    getattr(Damage(root, seed), kind)()
    which = f"{kind}, seed {seed}"
    store = Store(root, CPU)
    intact = [store.has(step.origin, step.part) for step in STEPS]
    assert not all(intact), f"{which}: not noticed"
    assert not damaged_copies(root), f"{which}: changed by a look"
    made = [artifact for artifact in make_all(root) if not artifact.cached]
    assert made, f"{which}: not made again"
    assert damaged_copies(root), f"{which}: not kept"
    assert data_of(root) == data_of(pristine), f"{which}: not as it was"
    assert all(artifact.cached for artifact in make_all(root)), f"{which}: made twice"
