"""Comparison of runs."""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

from alignkit.commands.evaluate import as_csv, evaluate
from alignkit.errors import ConfigError
from alignkit.evaluation.choice import elbow
from alignkit.evaluation.rows import Row
from alignkit.evaluation.table import table
from alignkit.runs.run import Run, open_run

MakeRun = Callable[..., Run]
QUICK = {"train.updates": 1, "surrogate.warmup": 0, "train.ema_decay": 0.0, "evaluate.limit": 5}


@pytest.fixture
def trained(tiny_run: MakeRun) -> list[Run]:
    for name, rate in (("first", 0.01), ("second", 0.005)):
        list(tiny_run(name, {**QUICK, "train.learning_rate": rate}).train())
    return [open_run(tiny_run(name, QUICK).folder) for name in ("first", "second")]


def test_two_runs_are_compared_with_one_measurement_before_training(trained: list[Run]) -> None:
    rows = evaluate(trained, steps=[1, 2])
    names = ["reward", "brightness", "drift"]
    expected = [
        (kind, k, name, run) for kind in ("unseen", "seen") for k in (1, 2) for name in names
        for run in ("first", "second")
    ]  # fmt: skip
    assert [(r.prompts, r.num_steps, r.reward, r.run) for r in rows] == expected
    for one, other in zip(rows[::2], rows[1::2], strict=True):
        assert one.before == other.before and one.after != other.after
        assert one.count == other.count == 5
        assert one.after is not None and one.low is not None and one.high is not None
        if one.reward != "drift":
            assert one.before_low is not None and one.before_low <= one.before <= (one.before_high or 0)
            assert one.difference == pytest.approx(one.after - one.before)
    assert all(row.after for row in rows if row.reward == "drift")


def test_runs_whose_folders_have_the_same_name_are_named_by_their_paths(trained: list[Run], tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere" / "first"
    shutil.copytree(trained[0].folder, copy)
    rows = evaluate([*trained, open_run(copy)], steps=[1], seen=False)
    assert {row.run for row in rows} == {str(trained[0].folder), "second", str(copy)}


def test_a_model_that_was_not_trained_has_neither_gain_nor_drift(tiny_run: MakeRun) -> None:
    rows = evaluate([tiny_run()], [2])
    assert {row.prompts for row in rows} == {"seen", "unseen"}
    assert all(row.difference == pytest.approx(0, abs=1e-9) for row in rows)


def test_runs_with_other_prompts_or_another_model_share_no_measurement(tiny_run: MakeRun, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("a white ring\na red cross\n", encoding="utf-8")
    lora = tiny_run("lora", {**QUICK, "train.learning_rate": 0.05})
    list(lora.train())
    plain = tiny_run("plain", QUICK)
    runs = [plain, tiny_run("prompts", {**QUICK, "data.prompts": str(other)})]
    runs.append(tiny_run("merged", {**QUICK, "model.adapter": str(lora.folder)}))
    together = evaluate(runs, steps=[1])
    alone = [row for run in runs for row in evaluate([run], steps=[1])]
    assert sorted(map(repr, together)) == sorted(map(repr, alone))
    # The plain run's start, the other prompts', and that of the merged LoRA; held-out prompts are the same for all.
    assert len({row.before for row in alone if row.reward == "brightness"}) == 3


def test_a_unet_without_a_middle_block_has_features(tiny_run: MakeRun) -> None:
    policy = tiny_run().policy()
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    policy.unet.mid_block = None
    assert policy.features(images).shape == (2, policy.unet.config.block_out_channels[-1])


def test_a_further_reward_is_measured_and_not_summed(tiny_run: MakeRun) -> None:
    rows = {row.reward: row for row in evaluate([tiny_run()], [1], rewards=["pixel_check"], seen=False)}
    assert rows["reward"].before == rows["brightness"].before != rows["pixel_check"].before


def test_without_held_out_prompts_the_seen_ones_are_measured_or_it_is_an_error(tiny_run: MakeRun) -> None:
    run = tiny_run(overrides={"evaluate.prompts": ""})
    assert {row.prompts for row in evaluate([run], [1])} == {"seen"}
    with pytest.raises(ConfigError, match=r"evaluate\.prompts: missing"):
        evaluate([run], [1], seen=False)


def test_progress_of_every_measurement_is_shown_and_removed_at_the_end(trained: list[Run]) -> None:
    console = Console(force_terminal=True, width=100, file=io.StringIO(), record=True)
    evaluate(trained, steps=[1], console=console)
    shown = console.export_text(clear=False)
    texts = [f"{name}, {kind} prompts, {when}" for name in ("first", "second") for kind in ("unseen", "seen")
             for when in ("before", "after")]  # fmt: skip
    # What came before is the same for both, on the same prompts, and measured once.
    assert [text for text in texts if text not in shown] == [text for text in texts if "before" in text][1:]


def test_the_table_states_which_runs_have_settings_that_are_not_the_papers() -> None:
    first = Row("reward", 2, 5, 0.5, 0.6, 0.1, 0.0, 0.2, run="first", departure="recipe slow, not the paper's")
    second = replace(first, run="second", departure="")
    console = Console(width=100)

    def shown(*rows: Row, title: str = "") -> list[str]:
        with console.capture() as capture:
            console.print(table(rows, title=title))
        return [line.strip() for line in capture.get().splitlines()]

    assert shown(first)[0] == "recipe slow, not the paper's"
    assert shown(first, second)[0] == "first: recipe slow, not the paper's"
    assert shown(second)[0].startswith("steps") or not shown(second)[0]
    assert shown(first, title="after 3 updates")[0] == "after 3 updates"


def test_the_table_names_runs_where_they_differ_and_csv_holds_all(trained: list[Run]) -> None:
    rows = evaluate(trained, steps=[1])
    console = Console(width=100)
    with console.capture() as capture:
        console.print(table([row for row in rows if row.prompts == "unseen"]))
    text = " ".join(capture.get().split())
    assert all(word in text for word in ("run", "first", "second", "drift", "that were not trained on"))
    assert all(f"[{row.low:+.3f}, {row.high:+.3f}]" in text for row in rows if row.prompts == "unseen")
    with console.capture() as capture:
        console.print(table([row for row in rows if row.run == "first" and row.prompts == "seen"]))
    text = " ".join(capture.get().split())
    assert "first" not in text and "of the training file" in text
    records = list(csv.DictReader(io.StringIO(as_csv(rows))))
    assert len(records) == len(rows) and records[0]["run"] == "first"
    assert float(records[0]["after"]) == rows[0].after


def test_features_are_those_of_the_model_before_training(tiny_run: MakeRun, tmp_path: Path) -> None:
    policy = tiny_run().policy()
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    before = policy.features(images)
    assert before.shape == (3, policy.unet.config.block_out_channels[-1]) and before.std(0).min() > 0
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.3
    assert torch.equal(policy.features(images), before)
    torch.testing.assert_close(policy.features(images[1:2]), before[1:2], rtol=1e-4, atol=1e-5)


def test_runs_are_compared_image_by_image(trained: list[Run]) -> None:
    rows = evaluate(trained, steps=[1], seen=False, win_rate="brightness")
    pairs = {(w.first, w.second): w for w in rows.wins}
    assert list(pairs) == [("first", "before training"), ("second", "before training"), ("first", "second")]
    assert all(w.count == 5 and w.prompts == "unseen" and w.low <= w.rate <= w.high for w in rows.wins)
    with pytest.raises(ConfigError, match="--win-rate: found 'beauty', expected one that first measures: brightness"):
        evaluate(trained, steps=[1], seen=False, win_rate="beauty")
    other = open_run(trained[1].folder, {"evaluate.seed": 5})
    with pytest.raises(ConfigError, match="first and second are not measured alike"):
        evaluate([trained[0], other], steps=[1], seen=False, win_rate="brightness")


def test_points_and_the_distance_to_real_images_are_rows(tiny_run: MakeRun, tmp_path: Path) -> None:
    prompts = tmp_path / "twenty.txt"
    prompts.write_text("\n".join(f"a red circle {i}" for i in range(20)), encoding="utf-8")
    evaluation = {"evaluate.points": 2, "evaluate.limit": 20, "evaluate.prompts": str(prompts)}
    run = tiny_run("pointed", {**QUICK, "train.updates": 2, "train.learning_rate": 0.05, **evaluation})
    list(run.train())
    photos = tmp_path / "photos"
    photos.mkdir()
    generator = torch.Generator().manual_seed(0)
    for i in range(24):
        pixels = torch.randint(256, (16, 16, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(photos / f"{i}.png")
    opened = open_run(run.folder)
    rows = evaluate([opened], steps=[1], seen=False, real=str(photos), points=True)
    found = {(row.reward, row.update): row for row in rows}
    assert {update for name, update in found if name == "fid"} == {None, 1, 2}
    fid = found["fid", None]
    assert fid.before > 0 and fid.after is not None and fid.difference == pytest.approx(fid.after - fid.before)
    # The run exports the weights of its last update, without an average; so does its last point.
    assert found["reward", 2].after == pytest.approx(found["reward", None].after)
    assert found["reward", 1].after != found["reward", 2].after
    assert elbow(rows).startswith("the smallest fid of the points is ")
    fresh = open_run(run.folder)
    with pytest.raises(ConfigError, match="contains no image"):
        evaluate([fresh], steps=[1], seen=False, real=str(tmp_path / "pointed" / "checkpoints"))
    for i in range(5, 24):
        (photos / f"{i}.png").unlink()
    with pytest.raises(ConfigError, match="--fid: found 20 prompts and 5 real images, expected at least 20 of each"):
        evaluate([fresh], steps=[1], seen=False, real=str(photos))
    assert fresh._policy is None  # refused before the model loads
