"""The demo's training: fair to both networks, and both learn the same."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from fused_mlp.demo import data, training
from fused_mlp.demo.errors import DemoError
from fused_mlp.demo.training import (
    NETWORKS,
    TRAIN_STEP,
    Settings,
    Trainee,
    compare,
    shuffled_batches,
)
from fused_mlp.eager import IntelligentResearchNetwork


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Keep many small steps from waiting for each other on a busy machine."""
    torch.set_num_threads(1)


def test_both_networks_learn() -> None:
    digits = data.split(data.load_bundled("digits"), seed=0)
    runs = compare(digits, Settings(epochs=12, batch_size=32, learning_rate=3e-3)).runs
    assert min(run.score for run in runs.values()) > 0.93
    # Five standard errors of the difference of two shares near 0.96 of 359 rows.
    assert abs(runs["eager"].score - runs["fused"].score) < 0.07
    assert all(run.losses[-1] < 0.2 * run.losses[0] for run in runs.values())


def test_train_step_learns_what_the_loop_learns() -> None:
    wine = data.split(data.load_bundled("wine"), seed=0, dtype=torch.float64)
    runs = compare(wine, Settings(epochs=5, dropout=0.0, train_step=True)).runs
    loop, step = (torch.tensor(runs[name].step_losses) for name in ("fused", TRAIN_STEP))
    torch.testing.assert_close(step, loop, rtol=1e-6, atol=1e-9)
    assert runs[TRAIN_STEP].score == runs["fused"].score


def test_regression_explains_variance() -> None:
    diabetes = data.split(data.load_bundled("diabetes"), seed=0)
    runs = compare(diabetes, Settings(epochs=20, batch_size=32)).runs
    assert min(run.score for run in runs.values()) > 0.25


@pytest.fixture(scope="module")
def wine() -> data.Split:
    return data.split(data.load_bundled("wine"), seed=0)


def test_without_dropout_the_loss_curves_agree_to_rounding() -> None:
    digits = data.load_bundled("digits")
    settings = Settings(epochs=3, batch_size=64, dropout=0.0)
    runs = compare(data.split(digits, seed=0), settings).runs
    eager, fused = (torch.tensor(runs[n].step_losses, dtype=torch.float64) for n in NETWORKS)

    # The same training in float64 says how far rounding alone drives float32 off.
    exact_data = data.split(digits, seed=0, dtype=torch.float64)
    exact_trainee = Trainee("eager", exact_data, settings)
    float32_data = data.split(digits, seed=0)
    exact_trainee.model.load_state_dict(Trainee("eager", float32_data, settings).model.state_dict())
    shuffle = torch.Generator().manual_seed(settings.seed)
    orders = [shuffled_batches(exact_data, 64, shuffle) for _ in range(2 + settings.epochs)]
    for batches in orders[2:]:  # compare() warms each network up on an order of its own
        exact_trainee.train_epoch(batches)
    exact = torch.tensor(exact_trainee.run.step_losses, dtype=torch.float64)

    epoch = len(exact) // settings.epochs
    torch.testing.assert_close(fused[:epoch], eager[:epoch], rtol=1e-5, atol=0)
    torch.testing.assert_close(fused, eager, rtol=1e-4, atol=0)
    rounding = (eager - exact).abs().max()
    assert rounding < 1e-4
    assert (fused - exact).abs().max() <= 4 * rounding + 1e-6


def last_losses(split: data.Split, dropout: float, network: str, seeds: range) -> torch.Tensor:
    """Return the loss of the last epochs for every seed; nothing is trained twice."""
    losses = []
    for seed in seeds:
        settings = Settings(epochs=8, batch_size=32, dropout=dropout, seed=seed, hidden=(32, 16))
        trainee = Trainee(network, split, settings)
        shuffle = torch.Generator().manual_seed(seed)
        for _ in range(settings.epochs):
            trainee.train_epoch(shuffled_batches(split, 32, shuffle))
        losses.append(sum(trainee.run.losses[-3:]) / 3)
    return torch.tensor(losses, dtype=torch.float64)


def paired_t(a: torch.Tensor, b: torch.Tensor) -> float:
    difference = a - b
    return float(difference.mean() / (difference.std() / math.sqrt(len(difference))))


def test_with_dropout_the_losses_agree_in_distribution(wine: data.Split) -> None:
    seeds = range(12)
    eager = last_losses(wine, 0.3, "eager", seeds)
    fused = last_losses(wine, 0.3, "fused", seeds)
    # Paired by initial weights and batches, so the masks alone differ. Student's t with 11 degrees
    # of freedom exceeds 5 by chance once in 2500 times.
    assert abs(paired_t(eager, fused)) < 5
    # The masks differ, or nothing was tested; and the test sees a dropout that is off by a bit.
    assert not torch.allclose(eager, fused, rtol=1e-3)
    other = last_losses(wine, 0.4, "eager", seeds)
    assert abs(paired_t(other, fused)) > 5


def test_batches_hold_every_row_once(wine: data.Split) -> None:
    batches = shuffled_batches(wine, 32, torch.Generator().manual_seed(3))
    assert [len(target) for _, target in batches] == [32, 32, 32, 32, 14]
    rows = torch.cat([features for features, _ in batches])
    assert not torch.equal(rows, wine.train_features)
    torch.testing.assert_close(
        rows.sort(dim=0).values, wine.train_features.sort(dim=0).values, rtol=0, atol=0
    )


def test_a_last_batch_of_one_row_is_left_out(wine: data.Split) -> None:
    batches = shuffled_batches(wine, 47, torch.Generator())
    assert [len(target) for _, target in batches] == [47, 47, 47]  # of 142 rows


def test_both_networks_see_the_same_weights_and_batches(
    wine: data.Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, dict[str, torch.Tensor], list[torch.Tensor]]] = []
    train_epoch = Trainee.train_epoch

    def spy(self: Trainee, batches: list[training.Batch]) -> None:
        state = {k: v.clone() for k, v in self.model.state_dict().items()}
        seen.append((type(self.model).__name__, state, [f.clone() for f, _ in batches]))
        train_epoch(self, batches)

    monkeypatch.setattr(Trainee, "train_epoch", spy)
    compare(wine, Settings(epochs=2))
    seen = seen[2:]  # the warm-up
    (eager, weights, batches), (fused, other_weights, other_batches) = seen[:2]
    assert [name for name, *_ in seen] == [eager, fused, fused, eager]  # they take turns in front
    assert weights.keys() == other_weights.keys()
    assert all(torch.equal(weights[k], other_weights[k]) for k in weights)
    assert all(torch.equal(a, b) for a, b in zip(batches, other_batches, strict=True))
    assert not torch.equal(batches[0], seen[2][2][0])


def test_run_reports_medians() -> None:
    run = training.Run(seconds=[0.5, 0.1, 0.2], samples=100)
    assert run.seconds_per_epoch == 0.2
    assert run.samples_per_second == 500


@pytest.mark.parametrize("hidden", [(8,), (8, 6), (9, 8, 7)])
def test_eager_network(hidden: tuple[int, ...]) -> None:
    model = IntelligentResearchNetwork(5, hidden, 2, dropout=0.2, negative_slope=0.1)
    kinds = [type(m).__name__ for m in model.research_layers]
    assert kinds == ["Linear", "ReLU", "Dropout"] * (len(hidden) - 1) + [
        "Linear",
        "BatchNorm1d",
        "LeakyReLU",
        "Linear",
    ]
    assert model(torch.randn(4, 5)).shape == (4, 2)
    with pytest.raises(ValueError, match="hidden_layers must name at least one width"):
        IntelligentResearchNetwork(5, [], 2)


# ------------------------------------------------------------------------------- splitting


def test_held_out_rows_use_the_training_statistics() -> None:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(50, 3, generator=generator, dtype=torch.float64) * 5 + 1e6
    features[:, 1] = 7.0
    target = torch.arange(50, dtype=torch.float64)
    made = data.split(data.Table("t", features, ("a", "b", "c"), target, None), seed=4)
    assert made.constant_columns == ("b",)
    assert (len(made.train_features), len(made.test_features)) == (40, 10)
    torch.testing.assert_close(made.train_features.mean(0), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(made.train_features.std(0), torch.ones(2))

    order = torch.randperm(50, generator=torch.Generator().manual_seed(4))
    train = features[order[10:]][:, [0, 2]]
    expected = (features[order[:10]][:, [0, 2]] - train.mean(0)) / train.std(0)
    torch.testing.assert_close(made.test_features, expected.float())
    rows = torch.cat([made.train_target, made.test_target])
    assert len(rows.unique()) == 50  # no row on both sides


def small_table(features: torch.Tensor, target: torch.Tensor, regression: bool) -> data.Table:
    columns = tuple(f"c{i}" for i in range(features.shape[1]))
    return data.Table("t", features.double(), columns, target, None if regression else ("x", "y"))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (small_table(torch.randn(9, 2), torch.arange(9.0), True), "9 rows are too few"),
        (small_table(torch.ones(20, 2), torch.arange(20.0), True), "every feature column is"),
        (small_table(torch.randn(20, 2), torch.ones(20), True), "target is the same in every"),
        (small_table(torch.randn(20, 2), torch.ones(20).long(), False), "same in every row"),
    ],
)
def test_tables_that_teach_nothing(made: data.Table, message: str) -> None:
    with pytest.raises(DemoError, match=message):
        data.split(made, seed=0)
