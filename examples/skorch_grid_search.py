"""Search hyperparameters with scikit-learn: FusedResearchNet in skorch's NeuralNetClassifier.

python examples/skorch_grid_search.py
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from sklearn.datasets import load_wine
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from skorch import NeuralNetClassifier
from torch import nn

from fused_mlp import FusedResearchNet

GRID = {
    "neuralnetclassifier__lr": [0.003, 0.03],
    "neuralnetclassifier__module__hidden_layers": [[32], [32, 16]],
    "neuralnetclassifier__module__dropout": [0.0, 0.3],
}


def search(
    network: Callable[..., nn.Module] = FusedResearchNet, grid: dict[str, list] = GRID
) -> GridSearchCV:
    """Return the finished search over ``grid``, on the wines of scikit-learn."""
    classifier = NeuralNetClassifier(
        network,
        module__input_dimensions=13,
        module__hidden_layers=[32, 16],
        module__output_dimensions=3,
        criterion=nn.CrossEntropyLoss,
        optimizer=torch.optim.SGD,
        optimizer__momentum=0.9,
        max_epochs=15,
        batch_size=32,
        iterator_train__drop_last=True,  # a batch norm cannot train on a single row
        train_split=None,
        verbose=0,
    )
    features, wines = load_wine(return_X_y=True)
    torch.manual_seed(0)
    pipeline = make_pipeline(StandardScaler(), classifier)
    result = GridSearchCV(pipeline, grid, cv=3, error_score="raise")
    return result.fit(features.astype("float32"), wines.astype("int64"))


if __name__ == "__main__":
    found = search()
    print(f"accuracy {found.best_score_:.3f} with {found.best_params_}")
