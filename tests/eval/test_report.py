"""The equal-quality headline, and what two results say about each other."""

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml

from eval.command import command
from eval.headline import confirmed, doubts, headline, pick, picked, summary
from eval.intervals import paired, wilson
from eval.memory_table import counted
from eval.pages import TABLES
from eval.pages import main as write_pages
from eval.recorded import memory, read_tables
from eval.report import changes, compare, draw, markdown, render, variant, write
from eval.result_file import read
from models.errors import InputError

PROMPTS = 1000


def row(strategy, label, lost, nfe, speed, **settings):
    count = PROMPTS - lost
    figures = {
        "exact_match": count / PROMPTS, "exact_match_interval": wilson(count, PROMPTS), "sequence_agreement": 0.9,
        "paired_difference": {"mean": -lost / PROMPTS, "interval": paired(0, lost, PROMPTS), "won": 0, "lost": lost},
        "nfe_mean": nfe, "nfe_median": nfe, "nfe_p95": nfe, "token_agreement": 0.9, "tokens_per_forward": 1.0,
        "prompts": PROMPTS,
    }  # fmt: skip
    common = {
        "gen_length": 128,
        "block_length": 32,
        "batch_size": 32,
        "dtype": "float32",
        "temperature": 0.0,
        "cache": "none",
        "eot": "commit",
    }
    return figures | {
        "label": label, "reference": "full_step", "settings": {"strategy": strategy} | common | settings,
        "by_task": {"sums": figures}, "by_length": {"1 to 2": figures}, "tokens_per_second": speed, "seconds": 4.0,
        "predictor_seconds": 3.0, "helper_seconds": 0.0, "loop_seconds": 1.0,
        "loop_share": 0.25, "tokens_per_second_without_helper": speed, "empty_answers": 0.0,
        "truncated_correct_answers": lost / PROMPTS, "forwards_saved_by_eot": None, "tokens": 40 * PROMPTS, "memory": None,
        "right": "0" * lost + "1" * count, "scorers": ["final answer"],
    }  # fmt: skip


ROWS = [
    row("full_step", "full_step", 0, 20.0, 100),
    row("threshold", "threshold 0.5", 40, 2.0, 1000),
    row("threshold", "threshold 0.9", 6, 4.0, 500),
    row("threshold", "threshold 0.95", 0, 5.0, 400),
    row("learn2pd", "learn2pd", 1, 2.5, 450),
    row("dico", "dico", 30, 1.0, 2000),
    row("oracle", "oracle", 0, 2.0, 900),
]


def result(rows=ROWS, **changed):
    return {
        "schema_version": 4, "command": "python eval/bench.py", "time": "now", "scorers": ["final answer"],
        "environment": {"device": "cpu", "threads": 2, "torch": "2", "transformers": "5", "git": "abc"},
        "base": {"name": "base", "fingerprint": "f"}, "headline": headline(rows), "rows": rows,
        "prompts": {"sources": [], "split": "test", "tasks": {"sums": PROMPTS}, "hashes": ["h"] * PROMPTS},
    } | changed  # fmt: skip


def entries(rows):
    (group,) = headline(rows)
    return {entry["strategy"]: entry for entry in group["strategies"]}


def test_the_cheapest_setting_as_good_as_full_step_is_picked():
    found = entries(ROWS)
    assert found["threshold"]["forwards"]["label"] == "threshold 0.9"  # 0.5 is cheaper and four points worse
    assert found["threshold"]["forwards"]["times"] == {"full_step": 5.0, "threshold": 1.0, "oracle": 0.5}
    assert found["threshold"]["speed"]["times"]["full_step"] == 5.0
    assert found["learn2pd"]["forwards"]["times"] == {"full_step": 8.0, "threshold": 1.6, "oracle": 0.8}
    assert found["learn2pd"]["speed"]["times"]["threshold"] == 0.9
    assert (found["threshold"]["settings_tried"], found["threshold"]["settings_as_good"]) == (3, 2)


def test_what_may_have_been_lucky_is_not_picked():
    close = row("threshold", "threshold 0.8", 9, 3.0, 600)  # .9 points, and .3 of standard error
    assert entries([*ROWS, close])["threshold"]["forwards"]["label"] == "threshold 0.9"


def test_where_full_step_answers_nothing_rightly_its_text_is_what_counts():
    # No answer is lost by any of them: the cheapest would be picked, however bad.
    rows = [
        row(label, label, 0, nfe, 1) | {"exact_match": 0.0, "token_agreement": agreement}
        for label, nfe, agreement in (("full_step", 20.0, 1.0), ("near", 10.0, 0.995), ("far", 2.0, 0.05))
    ]
    assert entries(rows)["far"]["forwards"] is None
    assert pick(rows[1:], 0.01)["label"] == "near"
    assert pick(rows[2:], 0.01)["label"] == "far"  # there is nothing better
    assert doubts(rows[0], 0.01)[0].startswith("full_step answers 0.0 % rightly")
    assert doubts(ROWS[0], 0.01) == []
    assert doubts(ROWS[0] | {"exact_match": None}, 0.01) == []


def test_a_strategy_that_loses_too_much_is_not_picked_however_fast():
    assert entries(ROWS)["dico"]["forwards"] is None
    assert "| dico | none of 1 is as good |" in markdown(result())
    lines = summary(headline(ROWS)).splitlines()
    assert "  dico: none of 1 settings" in lines
    assert "  threshold: 4.00 forwards (threshold 0.9), 500 tokens/s (threshold 0.9)" in lines


def test_a_loss_that_chance_does_not_rule_out_is_not_confirmed():
    found = entries(ROWS)
    assert found["learn2pd"]["forwards"]["confirmed"]  # 1 of 1,000 lost: at most .6 points with 95 %
    assert found["learn2pd"]["forwards_confirmed"] == found["learn2pd"]["forwards"] | {
        "times": {"full_step": 8.0, "threshold": 2.0, "oracle": 0.8}
    }
    threshold = found["threshold"]
    assert not threshold["forwards"]["confirmed"]  # 6 of 1,000 lost: it may be more than one point
    assert (threshold["forwards_confirmed"]["label"], threshold["speed_confirmed"]["label"]) == ("threshold 0.95",) * 2
    assert found["dico"]["speed_confirmed"] is None
    unsure = {"paired_difference": ROWS[4]["paired_difference"] | {"interval": (-0.1, 0.1)}}
    assert not confirmed(ROWS[4] | unsure, 0.01)
    assert confirmed(ROWS[0] | unsure, 0.01)  # the reference is as good as itself


def test_settings_picked_on_other_prompts_are_reported_as_they_are():
    others = [dict(row) for row in ROWS]
    others[1] = row("threshold", "threshold 0.5", 5, 2.5, 900)  # looked good there
    found = {entry["strategy"]: entry for entry in headline(ROWS, picked_on=others)[0]["strategies"]}
    assert found["threshold"]["forwards"]["label"] == "threshold 0.5"
    assert found["threshold"]["forwards"]["paired_difference"]["mean"] == -0.04  # and is not
    assert found["threshold"]["forwards"]["nfe_mean"] == 2.0
    assert not found["threshold"]["forwards"]["confirmed"]


def test_only_what_was_picked_has_to_be_reported():
    others = [dict(row) for row in ROWS]
    whole = headline(ROWS, picked_on=others)
    named = picked(whole)
    assert named == {"full_step", "threshold 0.9", "threshold 0.95", "learn2pd", "oracle"}
    assert headline([row for row in ROWS if row["label"] in named], picked_on=others) == whole


def test_other_conditions_do_not_compete():
    other = [
        row("full_step", "full_step b1", 0, 20.0, 50, batch_size=1),
        row("oracle", "o b1", 0, 1.0, 60, batch_size=1),
    ]
    groups = headline([*ROWS, *other])
    assert [group["batch_size"] for group in groups] == [32, 1]
    assert groups[0] == headline(ROWS)[0]
    assert groups[1]["strategies"][1]["forwards"]["times"] == {"full_step": None, "threshold": None, "oracle": 1.0}


def test_a_decode_that_writes_nothing_has_no_speed(tmp_path):
    rows = [{**r, "tokens_per_second": 0.0} for r in ROWS]
    assert entries(rows)["learn2pd"]["speed"]["times"] == {"full_step": None, "threshold": None, "oracle": None}
    assert entries(rows)["learn2pd"]["forwards"]["times"]["full_step"] == 8.0
    write(result(rows), tmp_path, 0.01)
    assert "| – |" in (tmp_path / "bench.md").read_text()
    assert "–" in changes(result(rows), result(rows))


def test_markdown_has_every_run_and_what_it_was_made_with():
    text = markdown(result())
    for entry in ROWS:
        assert f"| {entry['label']} | {PROMPTS} |" in text
    assert "`python eval/bench.py`" in text
    assert "## By task" in text
    assert "the reference" in text


def test_a_picture_is_drawn(tmp_path):
    draw(ROWS, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").stat().st_size > 10_000


def test_runs_on_other_prompts_are_not_drawn(tmp_path):
    draw(ROWS, tmp_path / "a.png")
    draw([*ROWS, ROWS[5] | {"prompts": 64}, ROWS[5] | {"reference": "another"}], tmp_path / "b.png")
    draw([*ROWS, ROWS[5] | {"nfe_mean": 9.0}], tmp_path / "c.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes() != (tmp_path / "c.png").read_bytes()


def test_variants_are_what_a_run_has_beside_its_strategy():
    usual = {"cache": "none", "eot": "commit"}
    assert variant({"strategy": "apd", "mixture_weight": 0.5, "kv_window": None, **usual}) == ""
    assert variant({"strategy": "apd", "kv_window": 16, **usual}) == "kv_window"
    assert variant({"strategy": "learn2pd", "filter": "x", **usual}) == ""
    assert variant({"strategy": "dico", "filter": "x", **usual}) == "filter"
    assert variant({"strategy": "full_step", "cache": "dual", "eot": "off"}) == "dual cache, EoT off"


def test_changes_are_paired_and_relative_to_each_own_machine():
    faster = [{**r, "tokens_per_second": 3 * r["tokens_per_second"]} for r in ROWS]
    faster[4] = row("learn2pd", "learn2pd", 31, 2.0, 3 * 900)
    text = changes(result(), result([*faster[:6], row("klass", "klass", 0, 3.0, 1)], scorers=["reasoning-gym"]))
    same = "| threshold 0.9 | 99.4 % → 99.4 % | +0.0 (-0.4 to +0.4) | 90.0 % → 90.0 % | 4.00 → 4.00 | 1.00 | 5.00× → 5.00× |"
    worse = (
        "| learn2pd | 99.9 % → 96.9 % | -3.0 (-4.3 to -2.1) | 90.0 % → 90.0 % | 2.50 → 2.00 | 0.80 | 4.50× → 9.00× |"
    )
    assert same in text
    assert worse in text
    assert "Only before: oracle." in text
    assert "Only after: klass." in text
    assert "- scorers: final answer → reasoning-gym" in text
    other = result(prompts={"tasks": {"sums": PROMPTS}, "hashes": ["other"] * PROMPTS})
    assert "other prompts" in changes(result(), other)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "a JSON file written by"),
        ("[]", "schema_version: found None"),
        ('{"schema_version": 2}', "schema_version: found 2; accepted: 3"),
    ],
)
def test_a_file_that_is_no_result_is_named(tmp_path, content, message):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(InputError, match=f"x.json.*{message}"):
        read(tmp_path / "x.json")


def test_a_result_is_rendered_again_with_another_margin(tmp_path, capsys):
    write(result(), tmp_path, 0.01)
    command({"render": render}, args=["render", "--result", str(tmp_path / "bench.json"), "--margin", "0.05"])
    again = read(tmp_path / "bench.json")
    assert again["rows"] == json.loads(json.dumps(ROWS))
    assert again["headline"][0]["strategies"][1]["forwards"]["label"] == "threshold 0.5"  # four points are allowed now
    assert "at most 5 point of exact match" in (tmp_path / "bench.md").read_text()
    assert (tmp_path / "bench.png").stat().st_size > 10_000
    assert "wrote bench.json" in capsys.readouterr().out


def test_a_result_with_the_older_name_of_the_eot_rule_is_read_and_told(tmp_path):
    text = json.dumps(result())
    (tmp_path / "old.json").write_text(text.replace('"eot": "commit"', '"eot": "filter"'))
    with pytest.warns(UserWarning, match=r"old\.json: eot: found 'filter', the older name of 'commit'"):
        assert read(tmp_path / "old.json") == json.loads(text) | {"picked_on": None}


def test_two_files_are_compared(tmp_path, capsys):
    for name in ("before", "after"):
        (tmp_path / f"{name}.json").write_text(json.dumps(result()))
    words = ["compare", "--before", str(tmp_path / "before.json"), "--after", str(tmp_path / "after.json")]
    command({"compare": compare}, args=[*words, "--out", str(tmp_path / "changes.md")])
    assert (tmp_path / "changes.md").read_text() in capsys.readouterr().out


FIXED = ("threshold 0.9", "factor 0.25", "klass 0.8")


def placed(*names):
    return "".join(f"<!-- {name} -->\nstale\n<!-- /{name} -->\nB\n" for name in names)


def test_pages_take_their_figures_from_results(tmp_path, capsys):
    twice = row("full_step", "full_step gen 256", 0, 21.0, 90, gen_length=256) | {"prompts": 256, "right": "1" * 256}
    write(result([*ROWS, row("apd", "apd R 0", 0, 3.0, 50), twice]), tmp_path, 0.01)
    costs = [one | {"settings": one["settings"] | {"block_length": 32}} for one in ROWS]
    costs[4]["component"] = {"per_forward": 1.0, "share_of_forward": 0.031}
    write(result(costs), tmp_path / "cost", 0.01)
    spent = row("learn2pd", "learn2pd budget 0.1", 2, 2.25, 460)
    write(
        result([*ROWS, spent], picked_on={"hashes": ["h"] * PROMPTS, "rows": [*ROWS, spent]}), tmp_path / "budget", 0.01
    )
    early = row("full_step", "full_step EoT learned 0.01", 2, 62.0, 100, eot="learned")
    write(result([ROWS[0] | {"nfe_mean": 84.0}, early, ROWS[4]]), tmp_path / "eot", 0.01)
    write(result(), tmp_path / "fresh", 0.01)
    judged = result(
        [ROWS[0], row("threshold", "threshold 0.95", 2, 5.5, 400), row("threshold", "threshold 0.9", 31, 4.5, 500)]
    )
    known = [ROWS[0], ROWS[3], ROWS[2]]
    write(judged | {"picked_on": {"hashes": ["h"] * PROMPTS, "rows": known}}, tmp_path / "risk", 0.01)
    filters = [
        row("learn2pd", f"{name} {threshold}", lost, nfe, 450, filter=name, threshold=threshold)
        | {"component": {"per_forward": 1.0, "parameters": size}}
        for name, size, threshold, lost, nfe in (
            ("small", 2112, 0.9, 40, 2.0), ("small", 2112, 0.98, 2, 4.0),
            ("large", 50_000, 0.9, 1, 2.5), ("large", 50_000, 0.98, 0, 3.0),
        )
    ]  # fmt: skip
    filters = [ROWS[0], ROWS[2], *filters]
    write(result(filters) | {"picked_on": {"hashes": ["h"] * PROMPTS, "rows": filters}}, tmp_path / "filters", 0.01)
    (tmp_path / "docs").mkdir()
    pages = {
        "README.md": ["front"],
        "docs/decoders.md": [
            "headline",
            "sweep",
            "beside",
            "cost",
            "long",
            "fresh",
            "eot",
            "risk",
            "budget",
            "filters",
        ],
        "docs/apd.md": ["apd"],
    }
    for page, names in pages.items():
        (tmp_path / page).write_text("A\n" + placed(*names))
    for _ in range(2):  # writing twice changes nothing
        command(write_pages, args=["--results", str(tmp_path), "--root", str(tmp_path)])
    found = {page: (tmp_path / page).read_text() for page in pages}
    assert not any("stale" in text for text in found.values())
    assert all(text.startswith("A\n<!-- ") and text.endswith(" -->\nB\n") for text in found.values())
    assert "| threshold 0.9 | 99.4 % | – | 4.0 | 500 |" in found["README.md"]
    assert "| dico |" not in found["README.md"]
    assert "| threshold | threshold 0.9 | 99.4 % | -0.6" in found["docs/decoders.md"]
    assert "| dico | none of 1 | – |" in found["docs/decoders.md"]
    assert "| learn2pd | 1000 | 32 | fp32 | 99.9 % | 90.0 % | 2.5 | 450 | 25.0 % | 3.1 % |" in found["docs/decoders.md"]
    assert "| full_step | 1000 | 32 | fp32 | 100.0 % | 90.0 % | 20.0 | 100 | 25.0 % | – |" in found["docs/decoders.md"]
    assert "Picked on 1000 validation prompts: learn2pd budget 0.1." in found["docs/decoders.md"]
    chosen = found["docs/decoders.md"].split("<!-- filters -->")[1]
    assert "| threshold 0.9 | – | 99.4 %" in chosen
    assert "| small 0.98 | 2,112 | 99.8 %" in chosen
    assert "Picked on 1000 validation prompts: small 0.98, large 0.9." in chosen
    sweep, beside = (found["docs/decoders.md"].split(f"<!-- {name} -->")[1] for name in ("sweep", "beside"))
    assert "| threshold 0.5 | 96.0 % | -4.0" in sweep
    assert [line for line in beside.split("<!--")[0].splitlines() if line.startswith("| full_step")]
    assert "threshold" not in beside.split("<!--")[0]
    # Of texts of 40 tokens in a region of 128 an oracle saves 88 forwards.
    assert (
        "| full_step (commit) | 100.0 % | the reference | – | 84.0 | 0.0 % | 0.0 % | 50.0 % |"
        in found["docs/decoders.md"]
    )
    assert (
        "| full_step EoT learned 0.01 | 99.8 % | -0.2 (-0.7 to +0.2) | – | 62.0 | 0.0 % | 0.2 % | 75.0 % |"
        in found["docs/decoders.md"]
    )
    # What loses 6 of 1,000 validation prompts is vouched for at 3 %, and loses 31 of 1,000 test prompts.
    assert "| threshold | 3 % | threshold 0.9 | 4.5 | 3.1 % | 200 of 200 | 0 of 200 |" in found["docs/decoders.md"]
    assert "| threshold | 5 % | threshold 0.9 | 4.5 | 3.1 % | 0 of 200 | 0 of 200 |" in found["docs/decoders.md"]
    assert [line.split(" | ")[0] for line in found["docs/apd.md"].splitlines() if " | " in line][1:] == [
        "| full_step", "| threshold 0.9", "| oracle", "| apd R 0"
    ]  # fmt: skip


def helper_row(layers, weight, speed, acceptance):
    figures = {
        "acceptance": acceptance, "forwards": 3.0, "milliseconds": 2.0 * layers, "predictor_milliseconds": 8.0,
        "parameters": 400_000 * (1 + layers),
    }  # fmt: skip
    name = f"{layers} layers R {weight:g}"
    return row("apd", name, 0, 3.0, speed, mixture_weight=weight) | {"helper": figures}


def test_helpers_of_several_sizes_have_a_table_a_picture_and_an_optimum(tmp_path, capsys):
    rows = [
        ROWS[0],
        *(helper_row(*one) for one in ((1, 0.5, 300, 0.6), (6, 0.5, 200, 0.9), (2, 0.5, 400, 0.8), (1, 0, 9, 0.5))),
    ]
    write(result(rows), tmp_path / "helper_sizes", 0.01)
    assert (tmp_path / "helper_sizes/bench_helpers.png").stat().st_size > 10_000
    line = "| 2 layers R 0.5 | 1.20 M | 80.0 % | 4.0 | 8.0 | 0.50 | 3.0 | 1.00 | 400 |"
    assert line in (tmp_path / "helper_sizes/bench.md").read_text()
    write(result(), tmp_path, 0.01)
    assert not (tmp_path / "bench_helpers.png").exists()
    write(result(rows[:2]), tmp_path / "dream", 0.01)
    for page, names in {
        "README.md": ["front"],
        "docs/decoders.md": ["headline", "sweep", "beside"],
        "docs/apd.md": ["apd", "helper_sizes"],
        "docs/families.md": ["dream"],
    }.items():
        (tmp_path / page).parent.mkdir(exist_ok=True)
        (tmp_path / page).write_text(placed(*names))
    write_pages(tmp_path, tmp_path)
    assert f"no {tmp_path}/cost/bench.json: cost stays as it is" in capsys.readouterr().out
    page = (tmp_path / "docs/apd.md").read_text()
    assert line.removesuffix("|") + "| 100.0 % | +0.0" in page
    dream = "| 1 layers R 0.5 | 100.0 % | +0.0 (-0.4 to +0.4) | 90.0 % | 60.0 % | 3.0 | 1.00 |"
    assert dream in (tmp_path / "docs/families.md").read_text()
    # One size alone has no optimum.
    assert "Most tokens a second: 1.20 M parameters at R 0.5 (400). 1000 prompts, batch 32, 2 threads." in page


def test_a_page_without_the_place_for_figures_is_named(tmp_path):
    write(result(), tmp_path, 0.01)
    page = tmp_path / "README.md"
    page.write_text("<!-- /front -->\n<!-- front -->\n")
    with pytest.raises(InputError, match=r"README.md: found no lines <!-- front --> and <!-- /front -->"):
        write_pages(tmp_path, tmp_path)
    assert page.read_text() == "<!-- /front -->\n<!-- front -->\n"


def test_pages_are_all_written_or_none(tmp_path):
    # Two or three tables were new and the others old when a later result was refused.
    write(result(), tmp_path, 0.01)
    (tmp_path / "cost").mkdir()
    (tmp_path / "cost/bench.json").write_text("{")
    (tmp_path / "bench.md").write_text("stale")
    (tmp_path / "docs").mkdir()
    for page, names in {
        "README.md": ["front"],
        "docs/decoders.md": ["headline", "sweep", "beside", "cost"],
    }.items():
        (tmp_path / page).write_text(placed(*names))
    with pytest.raises(InputError, match=r"cost/bench\.json"):
        write_pages(tmp_path, tmp_path)
    assert (tmp_path / "README.md").read_text() == placed("front")
    assert (tmp_path / "bench.md").read_text() == "stale"


def test_the_pages_that_are_committed_have_the_figures_of_the_results_beside_them(tmp_path):
    root = Path(__file__).parents[2]
    results = [file for file in (root / "eval/results").rglob("*.json") if "decodes" not in file.parts]
    assert {str(file.relative_to(root / "eval/results")) for file in results} <= {
        file for file, _, _ in TABLES.values()
    }
    beside = [file.with_suffix(".md") for file in results if file.name == "bench.json"]
    pages = [str(file.relative_to(root)) for file in beside] + [page for _, page, _ in TABLES.values()]
    for name in {*pages, *(str(file.relative_to(root)) for file in results)}:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / name, tmp_path / name)
    write_pages(tmp_path / "eval/results", tmp_path)
    for page in pages:
        assert (tmp_path / page).read_text() == (root / page).read_text(), f"python eval/pages.py writes {page} anew"


def test_a_table_of_figures_stands_between_its_comments():
    # A table written by hand is measured once and believed for ever.
    root = Path(__file__).parents[2]
    for page in {page for _, page, _ in TABLES.values()}:
        text = re.sub(r"<!-- (\w+) -->\n.*?<!-- /\1 -->", "", (root / page).read_text(), flags=re.DOTALL)
        cells = [cell.strip() for line in text.splitlines() if line.startswith("|") for cell in line.split("|")[2:-1]]
        assert [
            cell for cell in cells if re.fullmatch(r"[\d,]+\.?\d*( (%|s|MB|GB|GiB))?", cell) and cell != "1.0"
        ] == [], page


def test_every_benchmark_that_is_committed_is_among_what_is_made_anew():
    root = Path(__file__).parents[2]
    told = (root / "CONTRIBUTING.md").read_text().split("## What is bundled")[1]
    for file in sorted((root / "configs/eval").glob("*.yaml")):
        if yaml.safe_load(file.read_text())["out"].startswith("eval/results"):
            assert f"`{file.stem}.yaml`" in told, file.name


def test_the_memory_table_is_what_the_planner_counts(monkeypatch):
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    found = read_tables(root / "eval/results/memory.json")["memory"]
    settings = {name: found[name] for name in ("config_file", "dtype", "prompt_length")}
    for place in (0, -1):
        row = {name: found["rows"][place][name] for name in ("strategy", "batch_size", "gen_length", "cache")}
        again = found | {"rows": [counted(**settings, **row)]}
        assert memory({"memory": again})[-1] in memory({"memory": found}), "python eval/memory_table.py"


@pytest.mark.slow
def test_the_cases_that_are_told_are_those_that_pytest_collects():
    root = Path(__file__).parents[2]
    rows = read_tables(root / "eval/results/reliability.json")["checked"]["rows"]
    told = {test.strip("`"): cases for _, _, cases, test in rows if cases is not None}
    words = [sys.executable, "-m", "pytest", "--collect-only", "-q", *told]
    done = subprocess.run(words, cwd=root, capture_output=True, text=True, check=False)
    found = Counter(line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line)
    assert found == told, "eval/results/reliability.json"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "a JSON list"),
        ('{"kills": {"columns": ["a"], "rows": []}}', "kills: measured: found nothing"),
        (
            '{"kills": {"measured": "now", "columns": ["a"], "rows": [[1, 2]]}}',
            "kills.rows: found one of another length",
        ),
        ('{"hours": {}}', "hours: prompts: found nothing"),
    ],
)
def test_a_file_of_recorded_figures_that_is_none_is_named(tmp_path, content, message):
    (tmp_path / "scale.json").write_text(content)
    with pytest.raises(InputError, match=f"scale.json.*{message}"):
        read_tables(tmp_path / "scale.json")


def test_what_the_pages_say_in_words_is_what_the_results_say():
    root = Path(__file__).parents[2]

    def ratio(name: str, ending: str = "") -> str:
        """The filter's forwards by those of the best fixed rule that is as good."""
        rows = read(root / "eval/results" / name / "bench.json")["rows"]
        rows = {row["label"].removesuffix(ending): row["nfe_mean"] for row in rows if row["label"].endswith(ending)}
        return f"{rows['learn2pd 0.98'] / min(rows[fixed] for fixed in rows if fixed in FIXED):.2f}".removeprefix("0")

    readme, page = (" ".join((root / name).read_text().split()) for name in ("README.md", "docs/decoders.md"))
    assert f"The filter takes {ratio('')} times the forwards of the best fixed rule" in readme
    assert f"; {ratio('fresh')} times, and +.3 points, on 1,024 longer ones" in readme
    assert f"takes {ratio('')} times the forwards of the best fixed rule**" in page
    assert f"the filter at .98 takes {ratio('held_out')} times the forwards of `threshold` .9" in page
    assert f"The filter at .98 takes {ratio('fresh')} times the forwards of `threshold` .9" in page
    assert f"not trained on, {ratio('fresh', ' gen 256 limit 256')} times" in page
