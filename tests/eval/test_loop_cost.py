"""What the loop costs on random weights."""

from pathlib import Path

import pytest

from eval.loop_cost import COLUMNS, main
from eval.recorded import measured, read_tables
from models.errors import InputError

SIZES = {
    "batch_sizes": [1, 3],
    "prompt_length": 6,
    "gen_length": 16,
    "block_length": 8,
    "dtype": "float32",
    "device": "cpu",
}


def test_every_decode_is_timed_and_its_forwards_counted(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "loop.json"
    main(tiny_checkpoint / "config.json", ["full_step", "learn2pd"], ["none", "dual"], repeats=2, out=out, **SIZES)
    found = read_tables(out)
    rows = found["loop"]["rows"]
    assert [row[:3] for row in rows] == [
        [name, batch, cache] for batch in (1, 3) for cache in ("none", "dual") for name in ("full_step", "learn2pd")
    ]
    for row in rows:
        forwards, forward, loop, share = row[3], float(row[4]), float(row[5]), float(row[6].removesuffix(" %"))
        assert forwards == 16  # one token each
        assert forward > 0
        assert abs(share / 100 - loop / (forward + loop)) < 0.01
    table = measured("loop")(found)
    assert table[0] == f"| {' | '.join(COLUMNS)} |"
    assert "random weights in the sizes of config.json, float32" in table[-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strategies": ["apd"]}, "strategies"),
        ({"prompt_length": 4000}, "prompt_length: found 4000; accepted: at most"),
    ],
)
def test_what_random_weights_cannot_tell_is_refused(tiny_checkpoint: Path, tmp_path: Path, change, message) -> None:
    with pytest.raises(InputError, match=message):
        main(tiny_checkpoint, out=tmp_path / "loop.json", **{**SIZES, **change})
