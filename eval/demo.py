"""The last three lines of ``make demo``: what was trained, what it won or lost, what to run next."""

from pathlib import Path
from typing import Any

from eval.command import command
from eval.compare import share
from eval.headline import MARGIN, pick
from eval.result_file import read
from models.errors import InputError
from models.filter import load_filter


def main(result: Path = Path("runs/demo/bench.json")) -> None:
    """Prints the three lines.

    Args:
        result: Result of ``eval/bench.py``, whose last run has the new filter, and which has runs of ``threshold`` too.
    """
    print("\n" + "\n".join(told(read(result))))


def told(result: dict[str, Any]) -> list[str]:
    """The three lines.

    Raises:
        InputError: A result without a filter in its last run, without exact match, or without a threshold to compare with.
    """
    reference, ours = result["rows"][0], result["rows"][-1]
    fixed = [row for row in result["rows"] if row["settings"]["strategy"] == "threshold"]
    folder = ours["settings"].get("filter")
    if folder is None or not fixed or ours["exact_match"] is None:
        raise InputError(
            "result", f"runs {[row['label'] for row in result['rows']]}", "threshold, and a filter at the end"
        )
    net, config = load_filter(folder)
    weights = sum(each.numel() for each in net.parameters())
    threshold = ours["settings"]["threshold"]
    best = pick(fixed, MARGIN)
    count = ours["prompts"]
    more = round(count * (ours["exact_match"] - best["exact_match"]))
    cheaper = ours["nfe_mean"] < best["nfe_mean"]
    word = "won" if cheaper and more >= 0 else "traded" if cheaper or more > 0 else "lost"
    return [
        f"trained: {folder}, a {config.architecture} filter of {weights:,} weights, threshold {threshold:g} "
        f"(its card: {folder}/README.md)",
        f"{word}: {ours['nfe_mean']:.1f} forwards an answer, {reference['nfe_mean'] / ours['nfe_mean']:.1f} times fewer than "
        f"{reference['label']}, {ours['nfe_mean'] / best['nfe_mean']:.2f} of those of {best['label']}, the best "
        "threshold on these prompts; "
        f"exact match {share(ours['exact_match'])}, {reference['label']} {share(reference['exact_match'])}, {best['label']} "
        f"{share(best['exact_match'])} ({count} prompts: an answer is {100 / count:.1f} points)",
        f'next: python decoding/generate.py --filter {folder} --prompt "Mia starts with 9 coins. Mia finds 4 coins. How many '
        'coins does Mia have now?", and "On LLaDA-8B" in README.md for a base of your own',
    ]


if __name__ == "__main__":
    command(main)
