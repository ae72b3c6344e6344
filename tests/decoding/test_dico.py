"""DiCo against a plain reference: lists and loops for one row, written from the description of the phases."""

import itertools
import math

import pytest
import torch
from torch import nn

from decoding.strategies import Step, make_strategy
from decoding.strategies.dico import CONQUER, DIVIDE, FINALIZE
from models.errors import InputError
from models.features import Evidence
from models.filter import FilterConfig, build_filter, save_filter


class Reference:
    """DiCo for one row of one block, with the default settings. Clusters are lists of (first, last) positions."""

    def __init__(self, size):
        self.size, self.phase, self.clusters, self.steps, self.stalled = size, DIVIDE, [], 0, 0
        self.before_phase = None  # which positions were decoded before the Divide phase began
        self.visited = []

    def step(self, masked, c, margin, decoded, p=None):
        """Which positions are committed; ``p`` is the filter's probability."""
        phase = self.phase
        if phase == DIVIDE:
            if self.before_phase is None:
                self.before_phase = [not m for m in masked]
            seeds, w = self.find_seeds(masked, c, decoded)
            if not seeds:
                known = any(masked[i] for first, last in self.clusters for i in range(first, last + 1))
                phase = CONQUER if known else FINALIZE
        self.visited.append(phase)
        if phase == DIVIDE:
            return self.divide(masked, w, seeds)
        if phase == CONQUER:
            return self.conquer(masked, c if p is None else p)
        self.phase, self.clusters = FINALIZE, []
        chosen = {i for i in range(self.size) if masked[i] and (margin[i] > 3.0 or c[i] > 0.98)}
        return chosen or {self.best(masked, c)}

    def best(self, masked, c):
        return max((i for i in range(self.size) if masked[i]), key=lambda i: (c[i], -i))

    def find_seeds(self, masked, c, decoded):
        start = masked.index(True)
        length = self.size - start
        end_weight = min(1.0, 0.05 + 0.5 * decoded)
        rate = -math.log(end_weight) / (length - 1) if length > 1 else 0.0
        w = [c[i] * math.exp(-rate * (i - start)) if masked[i] else 0.0 for i in range(self.size)]
        score, seeds = list(w), []
        for _ in range(4):
            seed = max(range(self.size), key=lambda i: (score[i], -i))
            if w[seed] < 0.3:
                break
            seeds.append(seed)
            for i in range(self.size):
                score[i] *= 1 - math.exp(-((i - seed) ** 2) / (self.size / 3) ** 2)
        return seeds, w

    def grow(self, growing, is_hit):
        """The clusters ``growing`` with what each reaches on both sides; one never steps into or over another."""
        taken = {i for first, last in growing for i in range(first, last + 1)}

        def reach(edge, direction):
            end, misses, i = edge, 0, edge + direction
            while 0 <= i < self.size and i not in taken:
                if is_hit(i):
                    end, misses = i, 0
                else:
                    misses += 1
                    if misses > 2:
                        break
                i += direction
            return end

        return [(reach(first, -1), reach(last, 1)) for first, last in growing]

    def merge(self, clusters):
        merged = []
        for first, last in sorted(clusters):
            if merged and first <= merged[-1][1] + 1:
                merged[-1] = (merged[-1][0], max(merged[-1][1], last))
            else:
                merged.append((first, last))
        return merged

    def shrink(self, clusters, masked):
        spans = [[i for i in range(first, last + 1) if masked[i]] for first, last in clusters]
        return [(span[0], span[-1]) for span in spans if span]

    def mean(self, values, masked):
        inside = [values[i] for first, last in self.clusters for i in range(first, last + 1) if masked[i]]
        return sum(inside) / len(inside) if inside else None

    def divide(self, masked, w, seeds):
        known = self.clusters
        home = {seed: [k for k in known if k[0] <= seed <= k[1]] for seed in seeds}
        growing = {k for places in home.values() for k in places} | {(s, s) for s in seeds if not home[s]}
        grown = self.grow(sorted(growing), lambda i: masked[i] and not self.before_phase[i] and w[i] >= 0.3)
        self.clusters = self.merge(known + grown)
        new_seed = any(not places for places in home.values())
        growth = False
        for first, last in known:
            now = next(k for k in self.clusters if k[0] <= first <= k[1])
            growth |= 10 * ((now[1] - now[0]) - (last - first)) >= last - first + 1
        self.steps += 1
        self.stalled = 0 if new_seed or growth else self.stalled + 1
        mean = self.mean(w, [m and i not in seeds for i, m in enumerate(masked)])
        if (mean is not None and mean >= 0.6) or self.stalled == 2 or self.steps == 10:
            self.phase = CONQUER
        return set(seeds)

    def conquer(self, masked, c):
        self.phase = CONQUER
        clusters = self.shrink(self.clusters, masked)
        by_factor = set()
        for first, last in clusters:
            members = sorted((i for i in range(first, last + 1) if masked[i]), key=lambda i: (-c[i], i))
            n = max((n for n in range(1, len(members) + 1) if (n + 1) * (1 - c[members[n - 1]]) <= 1), default=0)
            by_factor |= set(members[:n])
        chosen = by_factor | {i for i in range(self.size) if masked[i] and c[i] > 0.98}
        best = self.best(masked, c)
        if not by_factor and c[best] >= 0.6:
            chosen.add(best)
        self.forced = not chosen
        chosen = chosen or {best}
        left = [m and i not in chosen for i, m in enumerate(masked)]
        grown = self.grow(clusters, lambda i: masked[i] and c[i] > 0.6)
        self.clusters = self.merge(self.shrink(self.merge(grown), left))
        mean = self.mean(c, left)
        if mean is None or mean < 0.6:
            self.phase = FINALIZE if left.count(False) / self.size >= 0.8 else DIVIDE
            self.clusters, self.steps, self.stalled, self.before_phase = [], 0, 0, None
        return chosen


class Script(nn.Module):
    """A filter that says what it is told to."""

    needs_all_positions = True
    probability = torch.zeros(0)

    def forward(self, evidence):
        return self.probability.logit()


CONFIG = FilterConfig(architecture="block_mlp", features=("confidence",), base_fingerprint="x")


def evidence_of(masked, confidence, margin=None):
    zero = torch.zeros_like(confidence)
    margin = zero if margin is None else margin
    return Evidence(masked, zero.long(), confidence, margin * masked, zero, zero.long(), zero)


def decide(strategy, memory, masked, confidence, margin=None, decoded=None, told=()):
    rows = len(masked)
    decoded = torch.zeros(rows) if decoded is None else decoded
    evidence, quota = evidence_of(masked, confidence, margin), torch.ones(rows, dtype=torch.long)
    log_confidence = confidence.log().clamp(min=-1e9).where(masked, -torch.inf)
    return strategy.decide(Step(evidence, log_confidence, quota, decoded=decoded, memory=memory, told=dict(told)))


def scene(kind, size, generator):
    """Confidences of a block, step after step, ``(size,)`` each: what a predictor might say in different moods."""
    place = torch.arange(size)
    level = torch.rand(size, generator=generator)
    if kind == "bumps":
        centres = torch.rand(4, generator=generator) * size
        level = torch.exp(-(((place - centres[:, None]) / (1 + size / 12)) ** 2)).amax(0)
    while True:
        noise = torch.rand(size, generator=generator)
        if kind == "random":
            yield noise
        elif kind == "low":
            yield 0.4 * noise
        elif kind == "sure":
            yield 1 - 0.2 * noise**2
        elif kind == "mixed":
            yield torch.where(noise > 0.5, 1 - 0.1 * level, noise)
        elif kind == "ties":
            yield (noise * 8).round() / 8
        else:  # "slow" and "bumps" change a little and rise as the block is decoded
            level = (level + 0.06 * (noise - 0.35)).clamp(0.001, 0.999)
            yield level


KINDS = ["random", "low", "sure", "mixed", "ties", "slow", "bumps"]


@pytest.fixture
def exact():
    """In float64, so that the reference's rounding does not decide anything."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def blocks(count, seed, size=None):
    for number in range(count):
        generator = torch.Generator().manual_seed(1000 * seed + number)
        length = size or int(torch.randint(1, 41, (), generator=generator))
        yield KINDS[number % len(KINDS)], length, generator


@pytest.mark.parametrize("filtered", [False, True], ids=["plain", "with a filter"])
def test_commits_and_phases_are_those_of_the_reference_in_hundreds_of_blocks(exact, filtered):
    network = Script() if filtered else None
    strategy = make_strategy("dico", network=network, config=CONFIG if filtered else None)
    seen, forced = set(), 0
    for kind, size, generator in blocks(280, seed=1 + filtered):
        reference, memory = Reference(size), strategy.memory(1, size)
        masked = torch.rand(1, size, generator=generator) < (1.0 if torch.rand((), generator=generator) < 0.7 else 0.6)
        masked[0, -1] = True
        earlier = torch.rand((), generator=generator)  # decoded share of the region without this block
        confidences = scene(kind, size, generator)
        for steps in range(size):
            c = next(confidences)[None]
            margin = 6 * c * torch.rand(1, size, generator=generator)
            decoded = 0.8 * earlier + 0.2 * (1 - masked.double().mean(1))
            p = torch.rand(1, size, generator=generator) ** 0.3
            if network is not None:
                network.probability = p
            rows = [x[0].tolist() for x in (masked, c, margin)]
            expected = reference.step(*rows, decoded.item(), p[0].tolist() if filtered else None)
            decision = decide(strategy, memory, masked, c if filtered else c * masked, margin, decoded)
            memory = decision.memory
            where = f"{kind}, {size} positions, step {steps}, phases {reference.visited}"
            assert {i for i, flag in enumerate(decision.transfer[0].tolist()) if flag} == expected, where
            masked = masked & ~decision.transfer
            assert memory["phase"].item() == reference.phase, where
            if reference.visited[-1] == CONQUER:
                assert bool(decision.counts["forced"]) == reference.forced, where
                forced += reference.forced
            if reference.phase != FINALIZE:
                inside = {i for first, last in reference.clusters for i in range(first, last + 1) if masked[0, i]}
                assert {i for i in range(size) if memory["inside"][0, i] and masked[0, i]} == inside, where
                assert memory["steps"].item() == reference.steps * (reference.visited[-1] == DIVIDE), where
            if not masked.any():
                break
        assert not masked.any(), where  # in at most as many steps as positions
        seen |= set(itertools.pairwise(reference.visited))
    ways = {(DIVIDE, DIVIDE), (DIVIDE, CONQUER), (DIVIDE, FINALIZE), (CONQUER, CONQUER), (CONQUER, DIVIDE)}
    assert seen == ways | {(CONQUER, FINALIZE), (FINALIZE, FINALIZE)}  # otherwise the comparison would be hollow
    assert forced


@pytest.mark.parametrize("size", [1, 7, 32])
def test_rows_in_different_phases_do_not_disturb_each_other(size):
    strategy = make_strategy("dico")
    together, alone = strategy.memory(14, size), [strategy.memory(1, size) for _ in range(14)]
    confidences = [scene(*block) for block in blocks(14, seed=3, size=size)]
    masked, phases = torch.ones(14, size, dtype=torch.bool), set()
    for _ in range(size):
        c = torch.stack([next(one) for one in confidences]) * masked
        c[~masked.any(1)] = 0.0
        live = masked.any(1)
        seen = masked.clone()
        seen[~live, 0] = True  # the loop takes finished rows out; here they stay, with a position to talk about
        decoded = 1 - masked.float().mean(1)
        decision = decide(strategy, together, seen, c, 5 * c, decoded)
        for row in range(14):
            one = slice(row, row + 1)
            # Told its phase, a row goes through that one alone; all of them together go through all.
            told = {"phase": alone[row]["phase"].flatten().tolist()}
            single = decide(strategy, alone[row], seen[one], c[one], 5 * c[one], decoded[one], told)
            assert torch.equal(single.transfer, decision.transfer[one])
            for name, value in single.memory.items():
                assert torch.equal(value, decision.memory[name][one]), name
            alone[row] = single.memory
        together = decision.memory
        phases |= {tuple(sorted(set(together["phase"][live].flatten().tolist())))}
        masked &= ~decision.transfer
    assert not masked.any()
    assert size == 1 or any(len(mix) > 1 for mix in phases)


def test_commits_masked_positions_in_every_row_whatever_it_remembers():
    strategy, generator = make_strategy("dico"), torch.Generator().manual_seed(4)
    for size in (1, 2, 5, 33):
        masked = torch.rand(200, size, generator=generator) < torch.rand(200, 1, generator=generator)
        masked[~masked.any(1), -1] = True
        c = torch.rand(200, size, generator=generator) * masked
        memory = {
            name: torch.randint(0, 3, (200, 1), generator=generator) for name in ("phase", "steps", "stalled")
        } | {"inside": torch.rand(200, size, generator=generator) < 0.5}
        decision = decide(strategy, memory, masked, c, 4 * c, torch.rand(200, generator=generator))
        assert not (decision.transfer & ~masked).any()
        assert decision.transfer.any(1).all()


def first_step(confidence, **settings):
    """One Divide forward over an undecoded block without trajectory guidance."""
    strategy = make_strategy("dico", beta=1.0, **settings)
    c = torch.tensor([confidence])
    return decide(strategy, strategy.memory(1, len(confidence)), torch.ones_like(c, dtype=torch.bool), c)


def test_clusters_grow_as_far_to_the_right_as_to_the_left():
    profile = [0.1, 0.1, 0.35, 0.5, 0.9, 0.5, 0.35, 0.1, 0.1]
    assert first_step(profile, seeds=1).memory["inside"].tolist() == [[2 <= i <= 6 for i in range(9)]]
    edge = [0.5, 0.9, 0.5]  # up to the block's ends
    assert first_step(edge, seeds=1).memory["inside"].tolist() == [[True] * 3]
    for kind, size, generator in blocks(210, seed=5):
        c = next(scene(kind, size, generator))
        c = c + 1e-4 * torch.rand(size, generator=generator)  # no ties, which go to the left
        ahead, back = first_step(c.tolist()), first_step(c.flip(0).tolist())
        assert torch.equal(ahead.transfer, back.transfer.flip(1))
        assert torch.equal(ahead.memory["inside"], back.memory["inside"].flip(1))


def test_growth_steps_over_two_misses_but_not_three_and_ends_at_a_hit():
    grown = first_step([0.4, 0.1, 0.1, 0.9, 0.1, 0.4, 0.1, 0.1, 0.1, 0.4, 0.4], seeds=1)
    assert grown.memory["inside"].tolist() == [[i <= 5 for i in range(11)]]
    alone = first_step([0.1, 0.1, 0.9, 0.1, 0.1], seeds=1)
    assert alone.memory["inside"].tolist() == [[False, False, True, False, False]]


def test_two_seeds_with_misses_between_them_stay_two_clusters_and_a_hit_between_joins_them():
    apart = first_step([0.9, 0.1, 0.1, 0.9], seeds=2, sigma=0.2)
    assert apart.transfer.tolist() == apart.memory["inside"].tolist() == [[True, False, False, True]]
    joined = first_step([0.9, 0.1, 0.35, 0.1, 0.9], seeds=2, sigma=0.2)
    assert joined.transfer.tolist() == [[True, False, False, False, True]]
    assert joined.memory["inside"].all()


def test_a_seeds_neighbours_are_ranked_lower_but_not_held_to_a_higher_bar():
    # Two positions from the first seed, Soft-NMS leaves a fifth of .9: less than .3, and a seed in the authors' code.
    near = first_step([0.9, 0.1, 0.95, 0.1, 0.9, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1], seeds=3)
    assert near.transfer[0].nonzero()[:, 0].tolist() == [0, 2, 4]
    # The first that is too low ends the search, whatever a later one would have had.
    low = first_step([0.9, 0.95, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.29, 0.1, 0.1, 0.1], seeds=3)
    assert low.transfer[0].nonzero()[:, 0].tolist() == [1]


def test_guidance_never_favours_the_end_of_the_block():
    strategy, c = make_strategy("dico", alpha=2.0, seeds=1), torch.tensor([[0.5, 0.4]])
    decision = decide(strategy, strategy.memory(1, 2), torch.ones(1, 2, dtype=torch.bool), c, decoded=torch.ones(1))
    assert decision.transfer.tolist() == [[True, False]]


def test_the_last_position_of_an_early_block_can_be_a_seed():
    # The guidance's power left of it would be 20 to the 31st: infinite, and not a number once multiplied by zero.
    strategy, masked = make_strategy("dico"), torch.arange(32)[None] == 31
    decision = decide(strategy, strategy.memory(1, 32), masked, masked * 0.5, decoded=torch.tensor([0.001]))
    assert torch.equal(decision.transfer, masked)
    assert decision.memory["phase"].item() == DIVIDE


def test_a_divide_forward_without_a_seed_is_not_wasted():
    strategy = make_strategy("dico")
    c = torch.tensor([[0.2, 0.25, 0.1, 0.2], [0.2, 0.25, 0.1, 0.2]])
    margin = torch.tensor([[0.0, 0.0, 4.0, 5.0], [0.0, 0.0, 4.0, 5.0]])
    memory = strategy.memory(2, 4)
    memory["inside"][1, :2] = True
    decision = decide(strategy, memory, torch.ones(2, 4, dtype=torch.bool), c, margin)
    # Nothing known: Finalize at once. A known cluster: a Conquer step, which here has nothing it would commit.
    assert decision.transfer.tolist() == [[False, False, True, True], [False, True, False, False]]
    assert decision.memory["phase"].flatten().tolist() == [FINALIZE, DIVIDE]
    assert decision.counts["forced"].tolist() == [0, 1]


def test_conquer_counts_within_each_cluster():
    strategy = make_strategy("dico")
    memory = strategy.memory(1, 8)
    memory["phase"][:] = CONQUER
    memory["inside"][:] = torch.tensor([[True, True, True, False, True, True, False, False]])
    c = torch.tensor([[0.7, 0.7, 0.7, 0.9, 0.7, 0.4, 0.99, 0.3]])
    # In a cluster .7 is good for n = 2 ((2 + 1)(1 - .7) = .9) but not for 3; outside only above .98.
    decision = decide(strategy, memory, torch.ones(1, 8, dtype=torch.bool), c)
    assert decision.transfer.tolist() == [[True, True, False, False, True, False, True, False]]
    assert decision.counts["forced"].tolist() == [0]


def test_confidences_of_decoded_positions_are_not_read():
    # A filter that needs all positions has them filled in; read as guesses they would plant and grow clusters.
    strategy = make_strategy("dico", network=Script(), config=CONFIG)
    generator = torch.Generator().manual_seed(6)
    masked = torch.rand(50, 20, generator=generator) < 0.5
    masked[:, -1] = True
    c, p = torch.rand(50, 20, generator=generator), torch.rand(50, 20, generator=generator)
    memory = strategy.memory(50, 20) | {"phase": torch.randint(0, 3, (50, 1), generator=generator)}
    memory["inside"] = torch.rand(50, 20, generator=generator) < 0.5
    both = []
    for shown, said in ((c, p), (c * masked, p * masked)):
        strategy.network.probability = said
        both.append(decide(strategy, memory, masked, shown))
    assert torch.equal(both[0].transfer, both[1].transfer)
    for name, value in both[0].memory.items():
        assert torch.equal(value, both[1].memory[name])


def test_a_filter_decides_in_conquer_and_its_commits_are_counted(tmp_path):
    config = FilterConfig(
        block_length=4, gen_length=4, vocab_size=64, mask_id=63, base_fingerprint="x", base_family="llada"
    )
    save_filter(tmp_path / "filter", build_filter(config), config, "# any\n")
    loaded = make_strategy("dico", filter=tmp_path / "filter")
    assert loaded.component == "filter_commits"
    assert loaded.needs == {"margin", "entropy", "history", "decoded"}
    assert loaded.settings()["filter"] == str(tmp_path / "filter")

    strategy = make_strategy("dico", network=Script(), config=CONFIG)
    memory = strategy.memory(1, 4) | {"phase": torch.tensor([[CONQUER]]), "inside": torch.ones(1, 4, dtype=torch.bool)}
    masked, c = torch.ones(1, 4, dtype=torch.bool), torch.tensor([[0.9, 0.9, 0.9, 0.9]])
    strategy.network.probability = torch.tensor([[0.1, 0.9, 0.1, 0.9]])
    decision = decide(strategy, memory, masked, c)
    assert decision.transfer.tolist() == [[False, True, False, True]]
    assert decision.counts["filter_commits"].tolist() == [2]
    strategy.network.probability = torch.tensor([[0.1, 0.2, 0.1, 0.1]])
    decision = decide(strategy, memory, masked, c)
    assert decision.transfer.tolist() == [[False, True, False, False]]
    # Forced, so none of the filter's doing: otherwise a filter that accepts nothing would never be reported.
    assert decision.counts["filter_commits"].tolist() == [0]
    assert decision.counts["forced"].tolist() == [1]


def test_without_a_filter_there_is_no_component_to_report():
    strategy = make_strategy("dico")
    assert strategy.component == ""
    assert strategy.needs == {"margin", "decoded"}
    assert "filter_commits" not in first_step([0.9, 0.5]).counts
    with pytest.raises(InputError, match="dico.config"):
        make_strategy("dico", network=Script())


def test_settings_are_complete_and_rebuild_the_strategy():
    settings = make_strategy("dico", seeds=2, margin=1.5).settings()
    assert settings.pop("strategy") == "dico"
    assert settings["seeds"] == 2
    assert make_strategy("dico", **settings).settings() == settings | {"strategy": "dico"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("divide_steps", 0), ("seeds", 0), ("seeds", 1.5), ("seed_threshold", 0.0), ("grow_threshold", 1.1),
        ("tolerance", -1), ("alpha", -0.1), ("beta", 0.0), ("sigma", 0.0), ("divide_exit", -1.0), ("patience", 0),
        ("growth", 0.0), ("sure", -1.0), ("factor", -1.0), ("top_threshold", -1.0), ("spread_threshold", -0.1),
        ("conquer_exit", float("nan")), ("finalize_share", 1.5), ("margin", -1.0),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_named(name, value):
    with pytest.raises(InputError, match=f"dico.{name}"):
        make_strategy("dico", **{name: value})
