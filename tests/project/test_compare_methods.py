"""benchmarks/compare_methods.py: cells pass `check`, generate the same number of samples, and can be resumed."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from alignkit.config import load as config
from alignkit.errors import ConfigError
from alignkit.runs.run import Run

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    return importlib.import_module("compare_tables")


@pytest.fixture
def compare(tables: ModuleType, no_pages: None) -> ModuleType:
    return importlib.import_module("compare_methods")


@pytest.fixture
def report(tables: ModuleType) -> ModuleType:
    return importlib.import_module("compare_report")


@pytest.fixture
def small(tables: ModuleType) -> Any:
    """DDPO on the two steps of `shapes_lcm`, four samples a round, with a reward that needs no weights."""
    methods = {"DDPO": tables.Method("ddpo", "samples", {"algorithm.samples": 2, "algorithm.baseline": "batch"})}
    settings = {"model.name": "shapes_lcm", "sampler.name": "lcm", "sampler.num_steps": 2, "data.batch_size": 2}
    settings |= {"reward": ["jpeg_compressibility"]}
    return tables.Table("small", "Small", "none", settings, (1, 2), 8, (1e-4, 1e-3), methods, images=1)


def read(out: Path) -> dict[str, Any]:
    """Return the results of all cells by name."""
    return {f.parent.relative_to(out).as_posix(): json.loads(f.read_text()) for f in sorted(out.rglob("result.json"))}


def mean_of(result: dict[str, Any]) -> float:
    return float(torch.tensor(result["values"]["1"]["trained"]).mean())


NAMES = [("lcm", 8), ("lcm_size", 4), ("turbo", 8), ("size", 6), ("rg_lcd", 4), ("offline", 3)]


@pytest.mark.parametrize(("name", "count"), NAMES)
def test_every_cell_is_a_run_that_check_accepts(tables: ModuleType, compare: ModuleType, name: str, count: int) -> None:
    table = tables.TABLES[name]
    assert len(table.methods) == count
    for shown in (table, tables.quick(table)):
        Run(config.load(None, tables.Cell(shown).settings())).check()
        rounds = []
        for method in shown.methods:
            samples = shown.methods[method].samples or shown.samples
            run = Run(config.load(None, tables.Cell(shown, method, 1e-4, 0, samples).settings()))
            run.check()
            assert run.config.train.learning_rate == 1e-4 and run.config.train.updates == tables.NEVER
            rounds.append(samples / compare.samples_of_a_round(run, shown.methods[method]))
        # The last round exceeds the number of samples by at most 1 %.
        assert shown is not table or all(-(-r // 1) / r < 1.01 for r in rounds)


def test_an_interrupted_cell_ends_as_one_that_was_not(
    tables: ModuleType, compare: ModuleType, small: Any, tmp_path: Path
) -> None:
    def cell(samples: int) -> Any:
        return tables.Cell(small, "DDPO", 1e-3, 0, samples)

    whole, outcome = compare.train(cell(12), tmp_path / "whole")
    compare.train(cell(4), tmp_path / "parts")
    parts, again = compare.train(cell(12), tmp_path / "parts")
    assert outcome["samples"] == again["samples"] == 12 and outcome["updates"] == again["updates"] == 3
    assert all(torch.equal(parts.weights[name], value) for name, value in whole.weights.items())
    assert any(bool(value.any()) for name, value in whole.weights.items() if "lora_B" in name)
    done, finished = compare.train(cell(12), tmp_path / "parts")
    assert finished["updates"] == 3 and finished["samples"] == 12
    done.policy()
    assert all(torch.equal(done.weights[name], value) for name, value in whole.weights.items())


def test_the_comparison_is_made_cell_by_cell_and_rendered(
    compare: ModuleType,
    report: ModuleType,
    small: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(compare.TABLES, "small", small)
    out = tmp_path / "out"
    base = ["--tables", "small", "--out", str(out), "--prompts", "3", "--seeds", "0"]
    compare.main([*base, "--cells", "2"])
    results = read(out)
    assert list(results) == ["small/base", "small/ddpo/tune-0.0001-seed100-8"]
    nothing = report.render({"small/base": results["small/base"]}, small)
    assert nothing == report.render({}, small) == "It has not been run.\n"
    compare.main(base)
    results = read(out)
    (final,) = (r for r in results.values() if r["method"] and not r["tuning"])
    tuned = {r["rate"]: compare.trained_mean(r) for r in results.values() if r["tuning"]}
    assert len(results) == 4 and tuned[final["rate"]] == max(tuned.values())
    assert final["samples"] == 8 and final["updates"] == 2 and set(final["drift"]) == {"1", "2"}
    assert len(final["values"]["2"]["pixel_check"]) == 3
    assert [point["samples"] for point in final["points"]] == [0, 4, 8] and not list(out.rglob("*points.json"))
    assert final["points"][2]["minutes"] >= final["points"][1]["minutes"] >= final["points"][0]["minutes"] == 0
    assert final["points"][2]["values"]["1"]["trained"] == pytest.approx(mean_of(final), abs=1e-4)  # of the same images
    with pytest.raises(ConfigError, match=r"--methods: found 'dddpo', expected one or more of 'DDPO', 'ddpo'$"):
        compare.main([*base, "--methods", "ddpo,dddpo"])
    before = sorted(file.stat().st_mtime_ns for file in out.rglob("result.json"))
    compare.main(base)  # nothing is left
    assert sorted(file.stat().st_mtime_ns for file in out.rglob("result.json")) == before
    # A run at a rate that is not the best stays in the folder but is not shown in the tables.
    (other,) = {1e-4, 1e-3} - {final["rate"]}
    assert len(report.final({**results, "other": {**final, "rate": other}}, small)) == 2
    monkeypatch.setattr(compare, "POINTS", 0)
    # A row with its own rate is not tuned, and one with its own number of samples generates that many.
    longer = replace(small.methods["DDPO"], rate=other, samples=12)
    monkeypatch.setitem(compare.TABLES, "small", replace(small, methods={**small.methods, "DDPO, longer": longer}))
    compare.main([*base, "--methods", "DDPO, longer"])
    (own,) = (r for r in read(out).values() if r["method"] == "DDPO, longer")
    assert (own["rate"], own["samples"], own["updates"], own["tuning"]) == (other, 12, 3, False)
    assert own in report.final(read(out), compare.TABLES["small"])
    monkeypatch.setitem(compare.TABLES, "small", small)
    capsys.readouterr()
    compare.main([*base, "--render"])
    text, mean = capsys.readouterr().out, float(torch.tensor(final["values"]["1"]["trained"]).mean())
    assert text.startswith("### Small (none)") and f"| DDPO | {mean:.3f} (" in text
    assert f"torch {torch.__version__}." in text and final["cpu"] in text
    # The page of a method has the same numbers, one line per number of steps.
    one, two = report.measured(results, "ddpo").splitlines()[2:]
    assert one.startswith(f"| Small: DDPO | 1 | {mean:.3f} | ") and two.startswith("|  | 2 | ")
    change = text.split(f"| DDPO | {mean:.3f} (")[1].split(")")[0]
    assert one.split(" | ")[3] == change
    assert report.measured(results, "sdpo").startswith("It has not been run")
    monkeypatch.setitem(compare.TABLES, "small", replace(small, settings={**small.settings, "sampler.num_steps": 3}))
    with pytest.raises(ConfigError, match=r"small/base: was run with other settings \(sampler.num_steps\)"):
        compare.main(base)
    monkeypatch.setitem(compare.TABLES, "small", small)
    monkeypatch.setattr(compare, "weights", lambda: "others")
    with pytest.raises(ConfigError, match=r"small/base: was run with other settings \(weights\)"):
        compare.main(base)


def test_the_quick_comparison_of_a_real_table_runs(compare: ModuleType, tmp_path: Path) -> None:
    compare.main(["--quick", "--tables", "turbo", "--methods", "SDPO", "--out", str(tmp_path)])
    results = read(tmp_path)
    assert {r["method"] for r in results.values()} == {"", "SDPO"} and len(results) == 4
    assert all(len(r["values"]["1"]["trained"]) == 8 for r in results.values())


def test_the_interval_is_that_of_seeds_and_prompts(report: ModuleType) -> None:
    prompts = torch.randn(1, 400, generator=torch.Generator().manual_seed(0))
    mean, low, high = report.interval(prompts)
    assert mean == pytest.approx(float(prompts.mean()), abs=1e-6)
    assert (high - low) / 2 == pytest.approx(1.96 / 20, rel=0.15)
    # Different seeds widen the interval even if all prompts are equal.
    seeds = torch.tensor([[0.0], [0.3]]).expand(2, 400)
    assert report.interval(seeds)[1:] == (0.0, pytest.approx(0.3))
    gap = torch.full((1, 4), 0.5)
    gap[0, 0] = torch.nan
    assert report.interval(gap) == (0.5, 0.5, 0.5)
