"""Train with PyTorch Lightning: FusedResearchNet in a LightningModule.

python examples/lightning_trainer.py
"""

from __future__ import annotations

import lightning
import torch
import torch.nn.functional as F
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fused_mlp import FusedResearchNet
from fused_mlp.functional import normalize


class Classifier(lightning.LightningModule):
    """A classifier around any network."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        features, labels = batch
        loss = F.cross_entropy(self.net(features), labels)
        self.log("loss", loss)
        return loss

    def test_step(self, batch: list[Tensor], index: int) -> None:
        features, labels = batch
        accuracy = (self.net(features).argmax(1) == labels).float().mean()
        self.log("accuracy", accuracy)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def data() -> TensorDataset:
    """Return the tumours of scikit-learn, each column standardised."""
    features, labels = load_breast_cancer(return_X_y=True)
    return TensorDataset(normalize(torch.tensor(features).float(), dim=0), torch.tensor(labels))


def train(net: nn.Module, epochs: int = 5) -> float:
    """Train ``net`` and return its accuracy."""
    lightning.seed_everything(0, verbose=False)
    rows = data()
    batches = DataLoader(rows, batch_size=64, shuffle=True, drop_last=True)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    classifier = Classifier(net)
    trainer.fit(classifier, batches)
    (results,) = trainer.test(classifier, DataLoader(rows, batch_size=len(rows)), verbose=False)
    return results["accuracy"]


if __name__ == "__main__":
    net = FusedResearchNet(input_dimensions=30, hidden_layers=[64, 32], output_dimensions=2)
    print(f"accuracy {train(net):.3f}")
