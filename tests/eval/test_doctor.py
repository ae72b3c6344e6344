"""The list of checks before a long run: what is healthy passes, what is broken is found by name before anything after it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from decoding.memory_plan import plan_memory
from eval import doctor
from eval.command import command
from models.errors import InputError
from models.predictor import MaskPredictor

ROOT = Path(__file__).resolve().parents[2]
BUNDLED = ROOT / "models/bundled"


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "base"))


def found_wrong(capsys: pytest.CaptureFixture[str], check: str, message: str, base: Path, **settings: object) -> None:
    """Asserts that a check fails with this message, after those before it have passed and before any other."""
    with pytest.raises(InputError, match=message):
        doctor.main(str(base), **{"device": "cpu", "prompt_length": 64, "gen_length": 32, **settings})  # type: ignore[arg-type]
    *before, last = capsys.readouterr().out.splitlines()
    assert last == f"WRONG  {check}"
    assert all(line.startswith(("ok ", "note ", "       ")) for line in before)


def test_a_healthy_base_with_its_filter_and_helper(capsys):
    doctor.main(
        filter=str(BUNDLED / "filter-llada-tiny"), helper=str(BUNDLED / "helper-llada-tiny"), device="cpu", gen_length=64
    )  # fmt: skip
    printed = capsys.readouterr().out
    checks = [line[7:27].strip() for line in printed.splitlines() if line.startswith("ok")]
    assert checks == [
        "versions", "device", "base", "dtype", "components", "memory", "weights", "special tokens", "tokenizer fence",
        "attention mask", "decode, threshold", "filter", "decode, learn2pd", "helper", "decode, apd",
    ]  # fmt: skip
    planned = [line[27:].split(":")[0] for line in printed.splitlines() if ": free " in line]
    assert planned == ["threshold", "learn2pd", "apd"]
    assert "#### 13" in printed  # the second prompt's answer
    assert "note   " in printed  # the filter was trained with gen_length 128
    assert printed.endswith("all is well\n")


@pytest.mark.slow
def test_every_family_passes(family_checkpoint, capsys):
    doctor.main(str(family_checkpoint), device="cpu", dtype="bfloat16", prompt_length=64, gen_length=32)
    assert capsys.readouterr().out.endswith("all is well\n")


def test_the_command_ends_with_status_2_and_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        command(doctor.main, args=["--base", str(tmp_path)])
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == "WRONG  base"
    assert f": {tmp_path}/config.json: found" in printed.err
    assert printed.err.count("\n") == 1


def test_a_package_that_is_too_old(folder, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "requires", lambda name: ["torch>=2.9", 'gone>=1; extra == "gym"'])
    monkeypatch.setattr(doctor, "version", lambda name: "2.8.0")
    found_wrong(capsys, "versions", r"torch: found 2\.8\.0; accepted: torch>=2\.9", folder)


def test_a_dtype_that_the_device_does_not_compute(folder, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "computes", lambda device, dtype: dtype == "float32")
    found_wrong(capsys, "dtype", "dtype: found bfloat16, .*; accepted: float32", folder, dtype="bfloat16")


def test_too_little_memory_for_the_batch(folder, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "free_memory", lambda device: 1 << 10)
    found_wrong(capsys, "memory", "memory: found 0.00 GiB free on cpu; accepted: threshold, peak .* GiB", folder)


def test_too_little_memory_for_the_filter_alone(monkeypatch, capsys):
    # A filter reads more of the logits than a threshold does: the plan of one does not speak for the other.
    def planned(*words, **settings):
        plan = plan_memory(*words, **settings)
        return replace(plan, peak=plan.peak << 30) if words[2].name == "learn2pd" else plan

    monkeypatch.setattr(doctor, "plan_memory", planned)
    message = "memory: found .* free on cpu; accepted: learn2pd, peak .* GiB"
    found_wrong(capsys, "memory", message, BUNDLED / "llada-tiny", filter=str(BUNDLED / "filter-llada-tiny"))


def test_a_component_that_cannot_be_read(folder, tmp_path, capsys):
    found_wrong(capsys, "components", "filter folder: found no folder", folder, filter=str(tmp_path / "none"))


def test_more_rows_than_can_be_counted(folder, capsys):
    message = "batch_size: found 1025; accepted: a whole number from 1 to 1024"
    found_wrong(capsys, "memory", message, folder, batch_size=1025)


def test_free_memory_is_of_this_machine():
    free = doctor.free_memory(torch.device("cpu"))
    assert free is None or 1 << 20 < free < 1 << 50


def test_a_missing_tensor(folder, capsys):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.transformer.ff_out.weight"]
    save_file(tensors, file, {"format": "pt"})
    found_wrong(capsys, "weights", r"safetensors: found .*model\.transformer\.ff_out\.weight", folder)


def test_a_special_token_without_an_embedding(folder, monkeypatch, capsys):
    whole = MaskPredictor.from_pretrained

    def cut(*words, **settings):
        predictor = whole(*words, **settings)
        predictor.vocab_size = predictor.ids.end_of_turn
        return predictor

    monkeypatch.setattr(MaskPredictor, "from_pretrained", cut)
    found_wrong(capsys, "special tokens", r"end of turn, <\|eot_id\|>: found id", folder)


def test_a_mask_token_that_a_message_can_write(folder, capsys):
    # A token that is not marked as special is found in any text, whatever the tokenizer is told.
    for name, key in (("tokenizer.json", "added_tokens"), ("tokenizer_config.json", "added_tokens_decoder")):
        content = json.loads((folder / name).read_text())
        tokens = content.get(key, [])
        for token in tokens.values() if isinstance(tokens, dict) else tokens:
            token["special"] = token["special"] and token["content"] != "<|mdm_mask|>"
        content.pop("mask_token", None)
        (folder / name).write_text(json.dumps(content))
    found_wrong(capsys, "tokenizer fence", r"tokenizer: found '<\|mdm_mask\|>' in a message becomes token", folder)


def test_no_chat_template_and_how_to_go_on_without(folder, capsys):
    (folder / "chat_template.jinja").unlink()
    found_wrong(capsys, "tokenizer fence", "chat_template: found a tokenizer without one", folder)
    doctor.main(str(folder), device="cpu", prompt_length=64, gen_length=32, chat_template=False)
    assert capsys.readouterr().out.endswith("all is well\n")


def test_padding_that_is_attended_to(folder, monkeypatch, capsys):
    whole = MaskPredictor.from_pretrained

    def blind(*words, **settings):
        predictor = whole(*words, **settings)
        model = predictor.forward
        predictor.forward = lambda ids, mask, *rest, **more: model(ids, None, *rest, **more)
        return predictor

    monkeypatch.setattr(MaskPredictor, "from_pretrained", blind)
    found_wrong(capsys, "attention mask", "attention_mask: found a padded row", folder)


def test_a_filter_for_another_vocabulary(folder, capsys):
    message = "filter: vocab_size: found 992; accepted: .*, that of the model"
    found_wrong(capsys, "memory", message, folder, filter=str(BUNDLED / "filter-llada-tiny"))


def test_a_filter_for_another_base(tmp_path, capsys):
    filter = Path(shutil.copytree(BUNDLED / "filter-llada-tiny", tmp_path / "filter"))
    config = json.loads((filter / "config.json").read_text())
    (filter / "config.json").write_text(json.dumps(config | {"base_fingerprint": "another"}))
    found_wrong(capsys, "filter", "base_fingerprint: found 'another'", BUNDLED / "llada-tiny", filter=str(filter))
