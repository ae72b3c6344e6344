"""The rollout set: compact, exact, readable by others, and the same however often its run was killed."""

import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from data.labels import collect, records_of
from data.manifest import MANIFEST, describe, intact, open_rollouts
from data.rollouts import load_records, load_sequences
from data.shards import RolloutKey, ShardWriter
from models.errors import InputError

EOT = 62


def write_all(folder: Path, key: RolloutKey, batches: list) -> None:
    """A run that decodes what is missing, as ``train/rollout.py`` does."""
    writer = ShardWriter(folder, key, [{"path": "somewhere"}])
    done = {prompt for record in writer.written() for prompt in record["prompts"]}
    for batch in batches:
        if not set(batch.hashes) <= done:
            writer.write(batch)
    writer.finish([prompt for batch in batches for prompt in batch.hashes])


@pytest.fixture
def batches(decoded) -> list:
    return [decoded(3, 0), decoded(3, 3), decoded(2, 6)]


@pytest.fixture
def folder(tmp_path: Path, key, batches) -> Path:
    write_all(tmp_path / "set", key, batches)
    return tmp_path / "set"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file; of the manifest, all but its time stamps."""
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    manifest = json.loads(files.pop("manifest.json"))
    assert manifest.pop("started") <= manifest.pop("finished")
    return files | {"manifest.json": json.dumps(manifest).encode()}


def test_records_come_back_exactly(folder: Path, batches) -> None:
    records = load_records(folder)
    start = 0
    for batch in batches:
        for row in range(len(batch.prompts)):
            for number, name in enumerate(("full_step", "oracle")):
                steps = collect(batch.traces[name])
                mine = (steps.rows == row).nonzero()[:, 0]
                there = slice(start, start + len(mine))
                start += len(mine)
                assert (records.passes[there] == number).all()
                assert (records.prompt[there] == batch.index[row]).all()
                assert torch.equal(records.step[there], steps.step[mine])
                assert torch.equal(records.block[there], steps.block[mine])
                assert records.evidence.present().keys() == steps.evidence.present().keys()
                for name, values in steps.evidence.present().items():
                    expected, found = values[mine], getattr(records.evidence, name)[there]
                    assert found.dtype == expected.dtype
                    assert torch.equal(found, expected), name
    assert start == len(records.prompt)
    assert records.prompt_ids == [f"p{n}" for n in range(8)]


def test_labels_come_back_exactly(folder: Path, batches) -> None:
    records = load_records(folder, passes=["oracle"])
    expected = [records_of({"oracle": b.traces["oracle"]}, b.references, [], [], EOT) for b in batches]
    assert torch.equal(records.final, torch.cat([part.final for part in expected]))
    assert torch.equal(records.tail, torch.cat([part.tail for part in expected]))
    assert records.splits == [split for batch in batches for split in batch.splits]


def test_limit_takes_the_first_prompts(folder: Path) -> None:
    whole, part = load_records(folder), load_records(folder, limit=4)
    assert part.prompt_ids == whole.prompt_ids[:4]
    assert torch.equal(part.final, whole.final[whole.prompt < 4])
    assert torch.equal(part.evidence.stable, whole.evidence.stable[whole.prompt < 4])


def test_sequences_come_back_exactly(folder: Path, batches) -> None:
    sequences = load_sequences(folder)
    assert sequences.prompts == [prompt for batch in batches for prompt in batch.prompts]
    assert sequences.tokens == [tokens for batch in batches for tokens in batch.tokens]
    assert torch.equal(sequences.references, torch.cat([batch.references for batch in batches]))
    for name in ("full_step", "oracle"):
        assert torch.equal(sequences.nfe[name], torch.cat([batch.nfe[name] for batch in batches]))


def test_end_of_text_evidence_is_stored_for_every_open_position(folder: Path, batches) -> None:
    table = pq.read_table(sorted(folder.glob("steps-*.parquet"))[0]).to_pylist()
    steps = collect(batches[0].traces["full_step"])
    for row, log_odds, top in zip(table, steps.eot_log_odds, steps.eot_top, strict=False):
        where = torch.tensor(row["open"])
        assert where.sum() == 16 - row["step"]
        torch.testing.assert_close(torch.tensor(row["eot_log_odds"]), log_odds[where], atol=5e-4, rtol=1e-3)
        assert row["eot_top"] == top[where].tolist()


def test_datasets_reads_the_shards(folder: Path, tmp_path: Path) -> None:
    import datasets

    steps = datasets.load_dataset(
        "parquet", data_files=str(folder / "steps-*.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert len(steps) == len(load_records(folder).prompt)
    assert len(steps[0]["confidence"]) == len(steps[0]["masked"]) == 4
    assert len(steps[0]["margin"]) == sum(steps[0]["masked"])
    sequences = datasets.load_dataset(
        "parquet", data_files=str(folder / "sequences-*.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert sorted(sequences["prompt_id"]) == [f"p{n}" for n in range(8)]


def test_the_papers_rollouts_stay_under_a_gigabyte(tmp_path: Path, noise, key) -> None:
    """2,640 prompts x 256 steps x block 32, at the worst: random numbers, and an oracle that saves not one forward."""
    batch = noise(4, 256, 32, 126_000)
    settings = key.settings | {"gen_length": 256, "block_length": 32}
    ShardWriter(tmp_path, replace(key, settings=settings)).write(batch)
    bytes_a_prompt = sum(file.stat().st_size for file in tmp_path.glob("*.parquet")) / 4
    assert 2 * bytes_a_prompt * 2640 < 1e9


class Killed(BaseException):
    """Not an Exception: nothing may catch it and tidy up."""


def test_killed_at_any_instant_the_finished_set_is_the_same(tmp_path: Path, key, batches, monkeypatch) -> None:
    write_all(tmp_path / "whole", key, batches)
    whole = contents(tmp_path / "whole")
    rename, instant = Path.replace, 0
    while True:
        folder = tmp_path / f"killed-{instant}"
        calls = 0

        def stop(self: Path, target: Path, at: int = instant) -> Path:
            nonlocal calls
            calls += 1
            if calls > at // 2:
                if at % 2:  # killed right after the rename, else right before
                    rename(self, target)
                raise Killed
            return rename(self, target)

        monkeypatch.setattr(Path, "replace", stop)
        try:
            write_all(folder, key, batches)
            break
        except Killed:
            pass
        finally:
            monkeypatch.setattr(Path, "replace", rename)
        write_all(folder, key, batches)
        assert contents(folder) == whole, instant
        instant += 1
    assert instant == 2 * (1 + 3 * 3 + 1)  # the manifest, three files a shard, the manifest


def test_a_half_written_file_is_swept_away(tmp_path: Path, key, batches) -> None:
    write_all(tmp_path / "whole", key, batches)
    writer = ShardWriter(tmp_path / "set", key, [{"path": "somewhere"}])
    writer.write(batches[0])
    for name in ("steps-0000005-aaaaaaaa.parquet", "steps-0000003-bbbbbbbb.parquet.part", "manifest.json.part"):
        (writer.folder / name).write_bytes(b"half a fi")
    write_all(tmp_path / "set", key, batches)
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


def test_a_file_system_without_locks_is_told(tmp_path: Path, key, monkeypatch) -> None:
    import fcntl

    def none(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    writer = ShardWriter(tmp_path, key)
    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.warns(UserWarning, match="claim-a: no file locks"), writer.claim("a") as mine:
        assert mine


def test_a_set_can_be_extended_and_stays_readable_meanwhile(folder: Path, key, batches, decoded) -> None:
    before = load_records(folder)
    writer = ShardWriter(folder, key)
    more = decoded(3, 8)
    writer.write(more)
    assert load_records(folder).prompt_ids == before.prompt_ids
    writer.finish(more.hashes)
    after = load_records(folder)
    assert after.prompt_ids == [f"p{n}" for n in range(11)]
    assert torch.equal(after.final[: len(before.final)], before.final)
    assert open_rollouts(folder).manifest["counts"]["prompts"] == 11


def inline(folder: Path) -> dict:
    """The manifest as it was before schema version 4, with the records of the shards in it."""
    found = open_rollouts(folder)
    return {name: value for name, value in found.manifest.items() if name != "digest"} | {
        "schema_version": 3,
        "shards": found.shards,
    }


def as_version_1(folder: Path) -> None:
    """Rewrites a set as the first schema had it."""

    def older(record: dict) -> dict:
        return {"states" if name == "passes" else name: value for name, value in record.items()}

    manifest = inline(folder)
    for number, shard in enumerate(manifest["shards"]):
        file = folder / shard["steps"]["file"]
        table = pq.read_table(file)
        names = ["states" if name == "pass" else name for name in table.column_names]
        pq.write_table(table.rename_columns(names), file)
        manifest["shards"][number] = older(shard) | {"steps": describe(file, table.num_rows)}
        (folder / f"shard-{shard['name']}.json").write_text(json.dumps(manifest["shards"][number]))
    settings = older(manifest["settings"]) | {"eot": "filter"}
    (folder / MANIFEST).write_text(json.dumps(manifest | {"schema_version": 1, "settings": settings}))


def test_a_set_of_the_first_schema_is_read_extended_and_told(tmp_path: Path, key, batches, decoded) -> None:
    key = replace(key, settings=key.settings | {"eot": "commit"})
    write_all(tmp_path, key, batches)
    before = load_records(tmp_path)
    as_version_1(tmp_path)
    with pytest.warns(UserWarning, match=r"schema_version 1; its states are read as passes"):
        older = load_records(tmp_path)
    assert all(
        torch.equal(getattr(older, name), getattr(before, name)) for name in ("passes", "final", "block", "step")
    )
    assert older.prompt_ids == before.prompt_ids
    with pytest.warns(UserWarning, match="EoT rule filter as commit"):
        write_all(tmp_path, key, [*batches, decoded(4, 8)])
    manifest = open_rollouts(tmp_path).manifest
    assert manifest["settings"]["eot"] == "commit"
    assert manifest["counts"]["prompts"] == 12
    assert torch.equal(load_records(tmp_path).final[: len(before.final)], before.final)


def test_a_set_without_ends_takes_them_from_the_references(folder: Path) -> None:
    before = load_records(folder)
    manifest = inline(folder)
    for shard in manifest["shards"]:
        steps, sequences = (folder / shard[kind]["file"] for kind in ("steps", "sequences"))
        pq.write_table(pq.read_table(steps).drop_columns("end"), steps)
        table = pq.read_table(sequences)
        place = table.column_names.index("first_eot")
        pq.write_table(table.set_column(place, "first_eot", pa.array([9] * len(table), pa.int32())), sequences)
        shard |= {
            kind: describe(file, shard[kind]["rows"]) for kind, file in (("steps", steps), ("sequences", sequences))
        }
    (folder / MANIFEST).write_text(json.dumps(manifest | {"schema_version": 2}))
    older = load_records(folder)
    assert torch.equal(older.final, before.final)
    assert torch.equal(older.tail, before.block[:, None] * 4 + torch.arange(4) > 9)
    assert not torch.equal(older.tail, before.tail)


def test_a_set_without_text_is_read_without_it(folder: Path) -> None:
    assert load_records(folder).evidence.text is not None
    manifest = inline(folder)
    shard = manifest["shards"][0]["steps"]
    path = folder / shard["file"]
    pq.write_table(pq.read_table(path).drop_columns(["text"]), path)
    shard |= describe(path, shard["rows"])
    (folder / MANIFEST).write_text(json.dumps(manifest))
    records = load_records(folder)
    assert records.evidence.text is None
    assert (records.evidence.confidence[records.evidence.masked] > 0).all()


def test_a_missing_or_repeated_prompt_is_refused(tmp_path: Path, key, decoded) -> None:
    writer = ShardWriter(tmp_path, key)
    writer.write(decoded(3, 0))
    with pytest.raises(InputError, match="1 not decoded, the first with hash 0123"):
        writer.finish(["0123"])
    writer.write(decoded(3, 2))
    with pytest.raises(InputError, match="1 written twice"):
        writer.finish([])


def test_an_unfinished_set_is_refused(tmp_path: Path, key, decoded) -> None:
    ShardWriter(tmp_path, key).write(decoded(3, 0))
    with pytest.raises(InputError, match=r"manifest\.json: complete: found False; accepted: a finished set"):
        load_records(tmp_path)


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"manifest\.json.*No such file.*accepted: the manifest of a rollout set"):
        open_rollouts(tmp_path)


def test_another_model_or_setting_is_refused_by_name(folder: Path, key) -> None:
    with pytest.raises(InputError, match=rf"model_fingerprint: found {'f' * 16}; accepted: {'0' * 16}"):
        open_rollouts(folder, fingerprint="0" * 16)
    with pytest.raises(InputError, match=r"settings\.gen_length: found 16; accepted: 256"):
        open_rollouts(folder, settings={"gen_length": 256})
    with pytest.raises(InputError, match="tokenizer_hash"):
        ShardWriter(folder, replace(key, tokenizer_hash="b"))
    with pytest.raises(InputError, match=r"settings\.block_length: found 4; accepted: 8"):
        ShardWriter(folder, replace(key, settings=key.settings | {"block_length": 8}))
    assert open_rollouts(folder, key.fingerprint, key.settings).manifest["counts"]["prompts"] == 8


@pytest.mark.parametrize("other", [{"fingerprint": "0" * 16}, {"settings": {"gen_length": 8}}])
def test_shards_without_a_manifest_keep_their_key(folder: Path, key, batches, other) -> None:
    # Another base, or other lengths, would adopt the shards and relabel them as its own.
    changed = replace(key, **other | ({"settings": key.settings | other["settings"]} if "settings" in other else {}))
    (folder / MANIFEST).unlink()
    with pytest.raises(InputError, match=r"parquet: (model_fingerprint|settings\.gen_length)"):
        ShardWriter(folder, changed)
    before = contents_without_manifest(folder)
    write_all(folder, key, batches)
    assert contents_without_manifest(folder) == before
    assert load_records(folder).prompt_ids == [f"p{n}" for n in range(8)]


def contents_without_manifest(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != MANIFEST}


def test_a_shard_of_another_set_is_refused_by_reader_and_merge(folder: Path, key) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"model_fingerprint": "0" * 16}))
    with pytest.raises(InputError, match=r"parquet: model_fingerprint"):
        load_records(folder)
    with pytest.raises(InputError, match=r"parquet: model_fingerprint"):
        ShardWriter.begun(folder).finish([])


def test_shards_of_unknown_origin_are_refused(folder: Path, key) -> None:
    # What older versions wrote says nothing of itself; only its manifest does.
    for file in folder.glob("*.parquet"):
        pq.write_table(pq.read_table(file).replace_schema_metadata(None), file)
        record = folder / f"shard-{file.stem.split('-', 1)[1]}.json"
        content = json.loads(record.read_text())
        kind = file.name.split("-")[0]
        record.write_text(json.dumps(content | {kind: describe(file, content[kind]["rows"])}))
    assert len(ShardWriter(folder, key).written()) == 3
    (folder / MANIFEST).unlink()
    with pytest.raises(InputError, match="unknown origin"):
        ShardWriter(folder, key)


@pytest.mark.parametrize("damage", ["", "{", "[]", "null", '{"name": "a"}', '{"steps": {"file": "../../x"}}'])
def test_a_damaged_record_is_decoded_again(folder: Path, key, batches, damage: str) -> None:
    before = contents(folder)
    sorted(folder.glob("shard-*.json"))[1].write_text(damage)
    write_all(folder, key, batches)
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": None}, "settings: found None; accepted: a valid dictionary$"),
        (
            {"settings": {"block_length": "4"}},
            r"settings\.block_length: found '4'; accepted: a whole number of at least 1",
        ),
        ({"complete": "yes"}, "complete: found 'yes'; accepted: .*boolean"),
        ({"shards": {}}, "shards: found {}; accepted: .*list"),
        (
            {"schema_version": 3, "shards": [{"name": "a"}]},
            r"shards\.0\.prompts: found nothing; accepted: a value; every key is required",
        ),
        (
            {"counts": {"prompts": -1, "steps": {}}},
            r"counts\.prompts: found -1; accepted: a whole number of at least 0",
        ),
    ],
)
def test_a_damaged_manifest_names_file_and_field(folder: Path, change: dict, message: str) -> None:
    path = folder / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=rf"manifest\.json: {message}"):
        open_rollouts(folder)


def test_a_manifest_sums_up_and_its_shards_keep_their_own_records(folder: Path, key, batches) -> None:
    # One JSON with every prompt in it would be rewritten whole with each of a million.
    manifest = json.loads((folder / MANIFEST).read_text())
    names = sorted(file.stem.removeprefix("shard-") for file in folder.glob("shard-*.json"))
    assert manifest["shards"] == names
    assert not [text for text in batches[0].hashes if text in json.dumps(manifest)]
    assert manifest["digest"] == open_rollouts(folder).digest
    record = folder / f"shard-{names[1]}.json"
    (folder / MANIFEST).write_text(json.dumps(manifest | {"shards": names[:2]}))
    with pytest.raises(InputError, match=rf"manifest\.json: digest: found {manifest['digest']}"):
        open_rollouts(folder)
    record.unlink()
    with pytest.raises(InputError, match=rf"{record.name}: found .*No such file.*run the rollout again"):
        open_rollouts(folder)


def test_a_set_with_all_records_in_its_manifest_is_read_and_extended(folder: Path, key, batches, decoded) -> None:
    before = load_records(folder)
    (folder / MANIFEST).write_text(json.dumps(inline(folder)))
    assert torch.equal(load_records(folder).final, before.final)
    write_all(folder, key, [*batches, decoded(4, 8)])
    manifest = json.loads((folder / MANIFEST).read_text())
    assert (manifest["schema_version"], manifest["counts"]["prompts"]) == (4, 12)
    assert torch.equal(load_records(folder).final[: len(before.final)], before.final)


def test_another_schema_is_refused(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 99}))
    with pytest.raises(InputError, match=r"schema_version: found 99; accepted: 1 \| 2 \| 3 \| 4"):
        load_records(folder)


def test_a_missing_column_is_named(folder: Path) -> None:
    path = sorted(folder.glob("steps-*.parquet"))[1]
    pq.write_table(pq.read_table(path).drop_columns(["margin"]), path)
    with pytest.raises(InputError, match=rf"{path.name}: column 'margin': found columns .*; accepted: .*margin"):
        load_records(folder)


@pytest.mark.parametrize("keep", [0, 100, -1])
def test_a_truncated_shard_is_named(folder: Path, keep: int) -> None:
    path = sorted(folder.glob("steps-*.parquet"))[1]
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=rf"{path.name}.*corrupt or truncated"):
        load_records(folder)


def test_a_flipped_bit_is_noticed(folder: Path) -> None:
    path = sorted(folder.glob("sequences-*.parquet"))[0]
    content = bytearray(path.read_bytes())
    content[40] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"{path.name}"):
        load_sequences(folder)


def test_a_writer_reads_a_shard_once_and_again_when_it_changes(folder: Path, key, batches, monkeypatch) -> None:
    read = []

    def looked_at(file: Path, record: dict) -> bool:
        read.append(file.name)
        return intact(file, record)

    monkeypatch.setattr("data.shards.intact", looked_at)
    writer = ShardWriter(folder, key)
    assert len(writer.written()) == len(batches)
    assert len(read) == 2 * len(batches)
    assert writer.written() == writer.written()
    assert len(read) == 2 * len(batches)
    damaged = next(folder.glob("steps-*"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert len(writer.written()) == len(batches) - 1
    assert set(read[2 * len(batches) :]) == {damaged.name}
    next(folder.glob("sequences-*")).unlink()
    assert len(writer.written()) <= len(batches) - 1


def test_a_missing_shard_is_named_and_a_rerun_repairs_it(folder: Path, key, batches) -> None:
    before = contents(folder)
    path = sorted(folder.glob("steps-*.parquet"))[1]
    path.unlink()
    with pytest.raises(InputError, match=rf"{path.name}: found no such file"):
        load_records(folder)
    write_all(folder, key, batches)
    assert contents(folder) == before


def test_passes_that_were_not_recorded_are_refused(folder: Path) -> None:
    with pytest.raises(InputError, match=r"passes: found 'filter'; accepted: full_step \| oracle"):
        load_records(folder, passes=["filter"])
