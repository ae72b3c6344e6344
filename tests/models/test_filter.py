import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models.errors import InputError
from models.features import FEATURES, Evidence
from models.filter import (
    FilterConfig,
    build_filter,
    check_compatible,
    import_official,
    load_filter,
    save_filter,
    size,
)

BASE = {"vocab_size": 1024, "mask_id": 5, "gen_length": 128}
CONV = FilterConfig(**BASE, base_fingerprint="abc", base_family="llada", metrics={"auroc": 0.9})
TEXT = replace(CONV, embedding=4)
STATES = replace(CONV, hidden=4, hidden_size=24)
MLP = replace(CONV, architecture="block_mlp", features=("confidence",))
OFFICIAL = {"linear1.weight": (32, 32), "linear1.bias": (32,), "linear2.weight": (32, 32), "linear2.bias": (32,)}


def evidence(rows: int, length: int, seed: int = 0) -> Evidence:
    g = torch.Generator().manual_seed(seed)
    masked = torch.rand(rows, length, generator=g) < 0.6
    some = [torch.rand(rows, length, generator=g) for _ in range(4)]
    confidence, margin, entropy, previous = (torch.where(masked, value, 0.0) for value in some)
    stable = torch.randint(0, 5, (rows, length), generator=g) * masked
    text = torch.randint(0, BASE["vocab_size"], (rows, length), generator=g)
    return Evidence(masked, torch.ones_like(stable), confidence, margin, entropy, stable, previous, text)


def official(path: Path, **changes) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(shape, generator=g) for name, shape in OFFICIAL.items()} | changes
    torch.save({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
    return tensors


def read_official(path: Path):
    return import_official(path, **BASE, fingerprint="abc")


def test_the_published_network_has_2112_parameters():
    assert sum(p.numel() for p in build_filter(MLP).parameters()) == 2112
    assert set(build_filter(MLP).state_dict()) == set(OFFICIAL)


@pytest.mark.parametrize("length", [32, 20])
def test_an_official_file_decides_as_its_authors_code(tmp_path: Path, length: int):
    w = official(tmp_path / "f.pth")
    net, config = read_official(tmp_path / "f.pth")
    some = evidence(64, length)
    some.confidence = torch.rand(64, length)  # of every position: this network reads decoded ones too
    padded = torch.zeros(64, 32)
    padded[:, :length] = some.confidence
    hidden = (padded @ w["linear1.weight"].T + w["linear1.bias"]).clamp(min=0)
    by_hand = (hidden @ w["linear2.weight"].T + w["linear2.bias"])[:, :length]
    assert (net.needs_all_positions, config.needs_all_positions, config.threshold) == (True, True, 0.96)
    torch.testing.assert_close(net(some), by_hand)
    assert torch.equal(net.probability(some) > config.threshold, torch.sigmoid(by_hand) > 0.96)


def test_an_official_file_survives_our_export(tmp_path: Path):
    official(tmp_path / "f.pth")
    net, config = read_official(tmp_path / "f.pth")
    save_filter(tmp_path / "out", net, config, "card")
    again, config_again = load_filter(tmp_path / "out")
    assert config_again == config
    assert torch.equal(again(evidence(4, 32)), net(evidence(4, 32)))
    assert again.needs_all_positions


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"linear2.bias": None}, "linear2.bias"),
        ({"linear1.weight": None}, "linear1.weight"),
        ({"linear3.bias": torch.ones(1)}, "linear3.bias"),
        ({"linear1.weight": torch.ones(32, 16)}, "linear1.weight"),
        ({"linear2.weight": torch.ones(16, 16)}, "linear2.weight"),
    ],
)
def test_another_pth_is_refused_by_tensor(tmp_path: Path, changes: dict, name: str):
    official(tmp_path / "f.pth", **changes)
    with pytest.raises(InputError) as error:
        read_official(tmp_path / "f.pth")
    assert error.value.field == f"{tmp_path / 'f.pth'}: {name}"


def test_a_pth_never_runs_code(tmp_path: Path):
    torch.save(build_filter(MLP), tmp_path / "module.pth")
    (tmp_path / "noise.pth").write_bytes(b"not a zip")
    torch.save([1], tmp_path / "list.pth")
    for name in ("module.pth", "noise.pth", "list.pth", "absent.pth"):
        with pytest.raises(InputError, match=name):
            read_official(tmp_path / name)


@pytest.mark.parametrize("config", [CONV, MLP, TEXT, replace(CONV, features=("entropy", "rank"), layers=1, kernel=3)])
def test_export_then_load_gives_the_same_logits_bit_for_bit(tmp_path: Path, config: FilterConfig):
    net = build_filter(config)
    net.fit_normalisation(evidence(100, 32))
    save_filter(tmp_path / "out", net, config, "card")
    again, config_again = load_filter(tmp_path / "out")
    assert config_again == config
    assert not again.training
    assert torch.equal(again(evidence(8, 32)), net(evidence(8, 32)))


def test_an_export_with_the_older_name_of_the_eot_rule_is_read_and_told(tmp_path: Path):
    save_filter(tmp_path, build_filter(CONV), replace(CONV, eot_rule="filter"), "# any\n")
    with pytest.warns(UserWarning, match=r"config\.json: eot_rule: found 'filter', the older name of 'commit'"):
        _, config = load_filter(tmp_path)
    assert config.eot_rule == "commit"


def test_an_undefined_metric_is_exported_as_null(tmp_path: Path):
    save_filter(tmp_path / "out", build_filter(CONV), replace(CONV, metrics={"auroc": float("nan")}), "card")
    assert load_filter(tmp_path / "out")[1].metrics == {"auroc": None}


@pytest.mark.parametrize("name", ["vocab_size", "mask_id", "gen_length", "base_fingerprint", "base_family"])
def test_a_filter_that_does_not_know_its_base_is_not_exported(tmp_path: Path, name: str):
    unset = replace(CONV, **{name: getattr(FilterConfig(), name)})
    with pytest.raises(InputError, match=name):
        save_filter(tmp_path / "out", build_filter(CONV), unset, "card")
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_is_not_the_configs_is_not_exported(tmp_path: Path):
    with pytest.raises(InputError, match=r"convs\.0\.weight"):
        save_filter(tmp_path / "out", build_filter(replace(CONV, kernel=3)), CONV, "card")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("architecture", "transformer"),
        ("architecture", ["conv"]),
        ("features", ["confidence", "colour"]),
        ("features", []),
        ("block_length", 0),
        ("kernel", 4),
        ("layers", 1.5),
        ("embedding", -1),
        ("embedding", None),
        ("channels", True),
        ("needs_all_positions", True),
        ("threshold", 1.5),
        ("threshold", "high"),
        ("vocab_size", None),
        ("block_alignment", "prompt"),
        ("confidence_dtype", "bfloat16"),
        ("metrics", {"auroc": "good"}),
        ("schema_version", 2),
        ("logits_only", False),
        ("logits_only", 1),
    ],
)
def test_an_impossible_field_is_refused_by_name(tmp_path: Path, name: str, value: object):
    save_filter(tmp_path / "out", build_filter(CONV), CONV, "card")
    file = tmp_path / "out" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    with pytest.raises(InputError) as error:
        load_filter(tmp_path / "out")
    assert error.value.field == f"{file}: {name}"


def test_a_block_longer_than_the_network_is_refused():
    with pytest.raises(InputError, match="block_length"):
        build_filter(MLP)(evidence(2, 33))


def test_conv_gives_a_moved_pattern_the_same_logits():
    pattern = evidence(4, 24, seed=3)
    net = build_filter(CONV)
    net.fit_normalisation(evidence(100, 32))

    def placed(at: int) -> torch.Tensor:
        wide = {
            name: torch.zeros(4, 64, dtype=value.dtype).index_copy(1, torch.arange(at, at + 24), value)
            for name, value in pattern.present().items()
        }
        return net(Evidence(**wide))[:, at : at + 24]

    with torch.no_grad():
        torch.testing.assert_close(placed(10), placed(31), rtol=1e-5, atol=1e-5)


def test_a_filter_that_reads_tokens_tells_them_apart():
    torch.manual_seed(0)
    some, net = evidence(8, 16), build_filter(TEXT)
    changed = replace(some, text=some.text.clone())
    changed.text[:, 3] += 1
    assert not torch.equal(net(some)[:, 2:5], net(changed)[:, 2:5])  # a decoded neighbour's word counts, too
    assert torch.equal(net(some)[:, 12:], net(changed)[:, 12:])
    net.dropout = 0.5
    assert not torch.equal(net(some), net(some))
    assert torch.equal(net.eval()(some), net(some))
    assert (TEXT.needs - CONV.needs, CONV.needs) == ({"text"}, {"margin", "entropy", "history"})


def test_a_filter_that_reads_hidden_states_runs_in_the_own_loop_alone(tmp_path: Path):
    torch.manual_seed(0)
    some, net = evidence(8, 16), build_filter(STATES)
    some.hidden = torch.randn(8, 16, 24).half()
    changed = replace(some, hidden=some.hidden.clone())
    changed.hidden[:, 3] += 1
    assert not torch.equal(net(some)[:, 2:5], net(changed)[:, 2:5])
    assert torch.equal(net(some)[:, 12:], net(changed)[:, 12:])
    assert torch.allclose(net(some), net(replace(some, hidden=4 * some.hidden)), atol=1e-4)  # their size says nothing
    save_filter(tmp_path, net, STATES, "card")
    again, config = load_filter(tmp_path)
    assert torch.equal(again(some), net.eval()(some))
    assert (config, config.logits_only, config.needs - CONV.needs) == (STATES, False, {"hidden"})
    card = (tmp_path / "README.md").read_text()
    assert "without the projection of hidden states. Reads hidden states, which other engines keep" in card
    for bad in ({"hidden": 4}, {"hidden_size": 24}, {"hidden": 4, "hidden_size": 1 << 30}):
        with pytest.raises(InputError, match="hidden_size|sizes"):
            build_filter(replace(CONV, **bad))
    with pytest.raises(InputError, match="hidden"):
        build_filter(replace(MLP, hidden=4, hidden_size=24))


def test_a_card_says_how_many_parameters_a_filter_has(tmp_path: Path):
    words = 4 * CONV.vocab_size
    without = sum(weights.numel() for weights in build_filter(CONV).parameters()) + 4 * CONV.channels * CONV.kernel
    assert size(build_filter(CONV)) == f"{without - 4 * CONV.channels * CONV.kernel:,} parameters"
    save_filter(tmp_path, build_filter(TEXT), TEXT, "card")
    card = (tmp_path / "README.md").read_text()
    assert f"\n{without + words:,} parameters, {without:,} without the embedding of tokens. Reads" in card


def test_an_older_export_reads_no_tokens_and_need_not_say_where_it_runs(tmp_path: Path):
    net = build_filter(CONV)
    save_filter(tmp_path, net, CONV, "card")
    config = json.loads((tmp_path / "config.json").read_text())
    del config["embedding"], config["hidden"], config["hidden_size"], config["logits_only"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_filter(tmp_path)[1] == CONV


def test_conv_takes_any_block_length():
    net = build_filter(CONV)
    for length in (1, 7, 32, 128):
        assert net(evidence(2, length)).shape == (2, length)


@pytest.mark.parametrize("config", [CONV, MLP])
def test_what_is_not_recorded_at_decoded_positions_is_not_read(config: FilterConfig):
    net, some = build_filter(config), evidence(16, 32)
    before = net(some)
    for name in ("confidence", "margin", "entropy", "previous"):
        setattr(some, name, torch.where(some.masked, getattr(some, name), 0.7))
    assert torch.equal(net(some), before)


def test_normalisation_is_fitted_and_a_constant_column_stays_finite():
    net, some = build_filter(CONV), evidence(200, 32)
    some.stable = torch.zeros_like(some.stable)
    net.fit_normalisation(some)
    place = list(FEATURES).index("confidence")
    assert net.mean[place].item() == pytest.approx(some.confidence.mean().item(), abs=1e-5)
    assert net.std[place].item() == pytest.approx(some.confidence.std().item(), abs=1e-4)
    assert net.std[list(FEATURES).index("stable")] == 1
    assert torch.isfinite(net(some)).all()


COMPATIBLE = {
    "family": "llada",
    "vocab_size": 1024,
    "mask_id": 5,
    "fingerprint": "abc",
    "gen_length": 128,
    "block_length": 32,
}


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"vocab_size": 126464}, "filter: vocab_size"),
        ({"mask_id": 6}, "filter: mask_id"),
        ({"fingerprint": "xyz"}, "filter: base_fingerprint"),
        ({"family": "Dream", "vocab_size": 9}, "filter: base_family"),
    ],
)
def test_another_base_model_is_refused_by_name(changes: dict, field: str):
    with pytest.raises(InputError) as error:
        check_compatible(CONV, **COMPATIBLE | changes)
    assert error.value.field == field


def test_block_length_is_fixed_for_the_published_network_only():
    with pytest.raises(InputError, match="block_length"):
        check_compatible(MLP, **COMPATIBLE | {"block_length": 64})
    assert check_compatible(MLP, **COMPATIBLE) == []
    (warning,) = check_compatible(CONV, **COMPATIBLE | {"block_length": 64})
    assert "block_length 32" in warning


def test_another_gen_length_is_a_warning():
    (warning,) = check_compatible(CONV, **COMPATIBLE | {"gen_length": 256})
    assert "gen_length 128" in warning
