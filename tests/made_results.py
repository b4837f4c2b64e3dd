"""Made-up results of two experiments, every number by a formula, so that tables and plots can be checked by hand."""

from collections.abc import Mapping
from typing import Any

from gdagrow.experiment.results import Arm, Comparison, Maps, Results, Run, Text

SEEDS = (0, 1, 2, 3, 4)
# What a seed adds to an arm's difference from the reference, in units of 0.001: mean 0, and in another order for each.
SCATTER = (-2.0, 1.0, 0.5, -1.5, 2.0)


def arm(name: str, told: str, **fields: Any) -> Arm:
    return Arm(**{
        "name": name, "told": told, "text": "code", "context_length": 128, "attention": "grouped differential",
        "hidden": 96, "ffn": 256, "layers": 2, "head_dim": 16, "signal_heads": 18, "noise_heads": 6, "kv_heads": 6,
        "parameters": 1_500_000, "tokens": 4_096_000, "flops": 3.6e13, "learning_rate": 0.002,
        "grown_from": None, "growth": None, **fields,
    })  # fmt: skip


def scattered(number: int, mean: float, seeds: tuple[int, ...] = SEEDS) -> tuple[float, ...]:
    """Differences with exactly that mean over all five seeds; `number` turns the scatter round."""
    return tuple(mean + SCATTER[(seed + number) % len(SCATTER)] / 1000 for seed in seeds)


def curve(loss: float, tokens: int, points: int = 9) -> tuple[tuple[int, float], ...]:
    return tuple((tokens * i // (points - 1), loss + 3.5 * (1 - i / (points - 1)) ** 4) for i in range(points))


def maps(number: int, seed: int, tokens: int, standard: bool) -> tuple[Maps, ...]:
    def layer(depth: int, step: int) -> Mapping[str, float]:
        figures = {
            "signal_entropy": 4.0 - 0.2 * step - 0.1 * number + 0.25 * depth + 0.01 * seed,
            "signal_top_5_percent": 0.1 + 0.05 * step + 0.02 * number + 0.05 * depth,
            "difference_entropy": 3.9 - 0.22 * step - 0.1 * number, "difference_top_5_percent": 0.2 + 0.05 * step,
            "difference_negative": 0.0 if standard else 0.25, "lambda": 0.0 if standard else 0.5 + 0.01 * number,
        }  # fmt: skip
        if not standard:
            figures |= {"noise_entropy": 4.2 - 0.05 * step - 0.02 * number, "noise_top_5_percent": 0.1 + 0.01 * number}
        return figures

    return tuple(Maps(tokens * step // 3, (layer(0, step), layer(1, step))) for step in range(4))


RATIOS = ((12, 12), (16, 8), (18, 6), (20, 5), (20, 4), (24, 3), (22, 2))
_EFFECTS = (-0.004, -0.011, -0.0005, 0.0005, 0.006, 0.009, 0.02, 0.002)


def ratio_results() -> Results:
    """Like a ratio scan: seven ratios against 1:1, and standard attention, with maps."""
    arms = [
        arm(f"r{signal // noise}", f"{signal // noise}:1", signal_heads=signal, noise_heads=noise, kv_heads=noise,
            parameters=1_500_000 + 20_000 * number, flops=3.6e13 + 4e11 * number)
        for number, (signal, noise) in enumerate(RATIOS)
    ]  # fmt: skip
    arms.append(arm("standard", "standard attention", attention="standard", signal_heads=24, noise_heads=0))
    runs = []
    for number, this in enumerate(arms):
        for seed in SEEDS:
            base = 1.3 + 0.01 * seed
            loss = base + (scattered(number, _EFFECTS[number - 1])[seed] if number else 0.0)
            runs.append(Run(
                this.name, seed, loss, curve(loss, this.tokens), 600.0, None,
                maps(number, seed, this.tokens, this.attention == "standard"),
            ))  # fmt: skip
    return Results(
        experiment="ratio", title="Ratio scan", question="Which ratio trains best?", scale="cpu",
        command="gdagrow experiment recipes/experiments/ratio.yaml --out ratio", versions={"gdagrow": "0.1.0"},
        recipe={"arms": {"r1": {"ratio": [12, 12]}}}, seeds=SEEDS, planned={"sd": 0.004, "detectable": 0.0067},
        texts=(Text("code", "{stdlib}/**/*.py", (1200, 64), (12_000_000, 640_000), 2.4871, 1.0123),),
        arms=tuple(arms),
        comparisons=(
            Comparison("At 24 query heads", "query heads", "r1", tuple(arm.name for arm in arms[1:7])),
            Comparison("Against standard attention", "tokens", "standard", ("r1", "r3")),
        ),
        tuning={"r1": {"0.001": 1.35, "0.002": 1.32, "0.004": 1.33}, "r3": {"0.002": 1.31, "0.004": 1.3}},
        runs=tuple(runs),
    )  # fmt: skip


def growth_results() -> Results:
    """Like a growth experiment that is not done: a source, three arms grown from it, one of them without runs."""
    none = arm("none", "no growth", tokens=3_000_000)
    signal = arm(
        "signal", "signal x2, exact copies", signal_heads=36, parameters=1_800_000, tokens=3_000_000,
        flops=4.5e13, grown_from="none",
        growth={"at": 100, "expand": {"signal": 2, "exact_copies": True}, "moments": "carry"},
    )  # fmt: skip
    uniform = arm(
        "uniform", "uniform x2 | noise at 40 dB", signal_heads=36, noise_heads=12, kv_heads=12, parameters=2_100_000,
        tokens=3_000_000, flops=5.1e13, grown_from="none", growth={"signal": 2, "noise": 2},
    )  # fmt: skip
    scratch = arm("scratch", "from scratch", signal_heads=36, parameters=1_800_000, tokens=1_000_000, flops=1.5e13)
    runs = []
    for number, this, seeds in ((0, none, SEEDS), (1, signal, SEEDS), (2, uniform, (0, 1, 3))):
        for seed in seeds:
            loss = 1.4 + 0.01 * seed + (scattered(number, (0.0, 0.001, -0.006)[number])[seed] if number else 0.0)
            before = 1.6 + 0.01 * seed
            points = [(0, 5.5), (1_000_000, 2.0), (2_000_000, before)]
            grown: dict[str, float] = {}
            if this.grown_from:
                grown = {"before": before, "after": before + 1e-7, "transient": 0.01 * number + seed / 1000}
                points.append((2_000_000, before + 1e-7))
            if grown and seed != 1:  # as in a run whose health was not looked at
                grown["copy_cosine"] = 1.0 if number == 1 else 0.95
            points += [(2_500_000, (before + loss) / 2 + 0.002 * number), (3_000_000, loss)]
            runs.append(Run(this.name, seed, loss, tuple(points), 300.0, grown or None, ()))
    return Results(
        experiment="growth", title="Growth", question="Does growing beat not growing?", scale="cpu",
        command="gdagrow experiment recipes/experiments/growth.yaml --out growth", versions={"gdagrow": "0.1.0"},
        recipe={}, seeds=SEEDS, planned={},
        texts=(Text("code", "{stdlib}/**/*.py", (1200, 64), (12_000_000, 640_000), 2.4871, 1.0123),),
        arms=(none, signal, uniform, scratch),
        comparisons=(Comparison("After growth", "tokens", "none", ("signal", "uniform", "scratch")),),
        tuning={}, runs=tuple(runs),
    )  # fmt: skip
