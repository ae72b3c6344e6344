"""The EoT head's own command: rollouts in, a head out, and what it learns from is what a decode shows it."""

import json

import pytest
import torch

from data.eot_data import load_eot_states
from data.prompts import PromptSource
from data.rollout_data import RolloutSettings
from data.rollouts import load_sequences
from decoding import Decoder
from decoding.config import DecodeConfig
from decoding.loop import decode
from decoding.strategies import make_strategy
from eval.command import command
from models import LLaDAModelLM
from models.eot import COLUMNS, EotConfig, EotHead, eot_columns, load_eot, save_eot
from models.errors import InputError
from models.predictor import MaskPredictor
from train.eot import calibrate, fit, main
from train.rollout_module import rollout


@pytest.fixture(scope="module")
def base(tiny_checkpoint, tiny_tokenizer, tmp_path_factory):
    """A base that says EoT now and then."""
    folder = tmp_path_factory.mktemp("ending") / "base"
    model = LLaDAModelLM.from_pretrained(tiny_checkpoint)
    with torch.no_grad():
        model.model.transformer["ff_out"].weight[model.config.eos_token_id] *= 2.5
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(base, tmp_path_factory):
    """Rollouts of both rules with EoT evidence, and without."""
    folder = tmp_path_factory.mktemp("eot")
    prompts = folder / "sums.jsonl"
    texts = [f"What is {a} + {b}?" for a in range(8) for b in range(8)]
    prompts.write_text("\n".join(json.dumps({"prompt": text}) for text in texts))
    settings = {"base": str(base), "sources": [PromptSource(str(prompts))], "gen_length": 16, "block_length": 8}
    rollout(RolloutSettings(folder=folder / "off", eot="off", eot_evidence=True, **settings), accelerator="cpu")
    rollout(RolloutSettings(folder=folder / "commit", eot_evidence=True, **settings), accelerator="cpu")
    rollout(RolloutSettings(folder=folder / "plain", **settings), accelerator="cpu")
    return folder


@pytest.mark.parametrize("steps", [1, 5])
def test_a_head_of_no_finite_loss_is_refused(steps):
    columns, lost = torch.randn(64, len(COLUMNS)), torch.arange(64) % 2
    with pytest.raises(InputError, match=r"loss: found (nan|inf) after \d steps; accepted: a finite number"):
        fit(EotHead(4), columns, lost.float(), steps, 1e30)


def test_a_decode_shows_the_head_what_it_learned_from(base, made, tmp_path, monkeypatch):
    # A column computed otherwise while decoding makes a head that is calibrated and wrong.
    predictor = MaskPredictor.from_pretrained(base, device="cpu")
    config = EotConfig(2, 16, 8, predictor.vocab_size, predictor.ids.mask, predictor.fingerprint, predictor.family)
    head = EotHead(2)
    torch.nn.init.zeros_(head.linear2.weight)
    save_eot(tmp_path / "head", head, config, "# EoT head\n")
    live = []
    monkeypatch.setattr(
        "decoding.eot.eot_columns",
        lambda said, masked, end: (
            live.append((masked.clone(), end.clone(), eot_columns(said, masked, end))) or live[-1][-1]
        ),
    )
    states, sequences = load_eot_states(made / "commit"), load_sequences(made / "commit")
    columns, able = states.columns(), states.able()
    settings = DecodeConfig(16, 8, eot="learned", eot_head=tmp_path / "head", eot_risk=1e-9)
    checked, ended = 0, 0
    after = torch.bincount(states.decode, weights=((states.end < 16) & states.masked.any(1)).double())
    for number in after[:64].argsort(descending=True)[:8].tolist():  # full_step's come first; most steps after an EoT
        rows = (states.decode == number).nonzero()[:, 0]
        tokens = [
            t for t, e in zip(sequences.tokens, sequences.first_eot, strict=True) if e == states.first_eot[rows[0]]
        ]
        found = []
        for prompt in tokens:
            live.clear()
            decode(predictor, [prompt], settings, make_strategy("full_step"))
            found.append(len(live) == len(rows) and all(
                torch.equal(masked[0], states.masked[row]) and end == states.end[row]
                and torch.allclose(column[0][able[row]], columns[row][able[row]], atol=5e-3)
                for row, (masked, end, column) in zip(rows, live, strict=True)
            ))  # fmt: skip
        assert any(found)
        checked, ended = checked + int(able[rows].sum()), ended + int(after[number])
    assert checked > 100
    assert ended > 20


@pytest.mark.parametrize("rule", ["commit", "off"])
def test_a_head_is_trained_exported_and_used(base, made, tmp_path, capsys, rule):
    words = ["--rollouts", made / rule, "--base", base, "--out", tmp_path / "head", "--steps", 50]
    command(main, args=list(map(str, words)))
    assert "text lost" in capsys.readouterr().out
    _, config = load_eot(tmp_path / "head")
    assert (config.gen_length, config.block_length) == (16, 8)
    assert 0 <= config.metrics["cut_text/0.01"] <= config.metrics["cut_text/0.05"] <= 1
    decoder = Decoder.from_pretrained(base, "threshold", threshold=0.5, device="cpu")
    settings = {"gen_length": 16, "block_length": 8}
    out = decoder.generate(["What is 1 + 1?"], **settings, eot="learned", eot_head=str(tmp_path / "head"), eot_risk=0.9)
    assert set(out.settings["fingerprints"]) == {"base", "eot"}
    assert out.settings["eot_risk"] == 0.9
    assert out.nfe <= decoder.generate(["What is 1 + 1?"], **settings).nfe


def test_a_set_without_a_decode_that_follows_its_reference_is_refused(made, monkeypatch):
    monkeypatch.setattr("data.eot_data._decodes", lambda *rows: [])
    with pytest.raises(InputError, match=r"passes: found .*; accepted: full_step or oracle among them"):
        load_eot_states(made / "commit")


def test_rollouts_that_cannot_teach_it_are_refused(base, made, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        command(main, args=["--rollouts", str(made / "plain"), "--base", str(base), "--out", str(tmp_path / "head")])
    assert stop.value.code == 2
    assert "eot_evidence: found False" in capsys.readouterr().err


def test_calibration_takes_a_head_back_to_the_share_that_is_true():
    torch.manual_seed(0)
    head = EotHead(1)
    for value in head.parameters():
        torch.nn.init.constant_(value, 0.0)
    head.linear1.weight.data[0, 0], head.linear1.bias.data[0], head.linear2.weight.data[0, 0] = 4.0, 40.0, 1.0
    head.linear2.bias.data[0] = -40.0  # log-odds 4x, where x is the truth
    columns = torch.randn(20_000, len(COLUMNS))
    lost = (torch.rand(20_000) < columns[:, 0].sigmoid()).float()
    calibrate(head, columns, lost)
    said = head(columns).sigmoid()
    for low in (0.1, 0.4, 0.7):
        part = (said > low) & (said < low + 0.2)
        assert lost[part].mean().item() == pytest.approx(said[part].mean().item(), abs=0.03)
