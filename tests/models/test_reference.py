"""Logits against committed ones of a float64 computation; ``PYTHONPATH=. python tests/models/test_reference.py`` writes them.

``plain`` of ``tests/conftest.py`` computed them once, of seeded random models: no change to both at once goes unseen.
"""

import importlib.util
import json
import sys
from pathlib import Path

import torch

FOLDER = Path(__file__).parent / "reference"
POSITIONS, EVERY = [0, 1, 6, 12], 10
"""What is kept of the logits: these positions, and one id in ten."""
MODEL = {"vocab_size": 300, "mask": 299, "eot": 298, "scale": 4, "rope_theta": 100.0}


def ids() -> torch.Tensor:
    return torch.randint(0, 298, (13,), generator=torch.Generator().manual_seed(1))


def test_logits_are_the_committed_ones(family, make_model):
    expected = torch.tensor(json.loads((FOLDER / f"{family}.json").read_text()))
    with torch.no_grad():
        ours = make_model(family, **MODEL)(ids()[None]).logits[0, POSITIONS, ::EVERY]
    torch.testing.assert_close(ours, expected, atol=1e-4 * expected.abs().max().item(), rtol=0)


def main() -> None:
    """Writes a file a family."""
    spec = importlib.util.spec_from_file_location("shared_models", Path(__file__).parents[1] / "conftest.py")
    assert spec is not None
    assert spec.loader is not None
    shared = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(shared)
    for family in shared.FAMILIES:
        with torch.no_grad():
            logits = shared.plain(shared.random_model(family, **MODEL), ids())[0][POSITIONS, ::EVERY]
        rows = [[round(value, 6) for value in row] for row in logits.tolist()]
        (FOLDER / f"{family}.json").write_text(json.dumps(rows) + "\n")
        sys.stdout.write(f"wrote {FOLDER / family}.json\n")


if __name__ == "__main__":
    main()
