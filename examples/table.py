"""Which columns decide? A small network on scikit-learn's table of breast cancer: dense network against traces.

    pip install --no-build-isolation '.[examples]'
    python examples/table.py [rows]

The network is trained here, in seconds. Each row is explained by input x gradient on the dense network, on the row's
own trace, and on the trace of another row, which is the control. What counts is what the dense network makes of the
columns: those that an explanation ranks first are removed (set to their mean) or inserted, and the probability of the
predicted class is averaged over all numbers of columns. Integrated gradients of the dense network need no trace.
"""

from __future__ import annotations

import sys
import warnings

import torch
from captum.attr import InputXGradient, IntegratedGradients
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn

import spade_fast
from spade_fast.attribution import metrics


def train(table: Tensor, classes: Tensor) -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    optimizer = torch.optim.AdamW(network.parameters(), 0.003, weight_decay=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(table), classes).backward()
        optimizer.step()
    return network.eval()


def areas(network: nn.Module, rows: Tensor, maps: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The areas in % under the curves of insertion and deletion, one per row; a row is an image of one line."""
    given = nn.Sequential(nn.Flatten(), network), rows[:, None, None], maps[:, None], targets
    curves = (curve(*given, steps=30, baseline="zero") for curve in (metrics.insertion_curve, metrics.deletion_curve))
    insertion, deletion = (100 * metrics.auc(curve) for curve in curves)
    return insertion, deletion


def difference(found: Tensor, dense: Tensor) -> str:
    low, high = metrics.bootstrap_interval(found - dense)
    return f"{float((found - dense).mean()):+5.1f} [{low:+5.1f}, {high:+5.1f}]"


def main(count: int = 40) -> None:
    warnings.filterwarnings("ignore", "Input Tensor 0 did not already require gradients")
    data = load_breast_cancer()
    table, classes = torch.tensor(data.data).float(), torch.tensor(data.target)
    held_out = torch.arange(len(table)) % 4 == 0
    mean, std = table[~held_out].mean(0), table[~held_out].std(0)
    table = (table - mean) / std
    network = train(table[~held_out], classes[~held_out])
    accuracy = (network(table[held_out]).argmax(1) == classes[held_out]).float().mean()
    print(f"the network is right on {accuracy:.1%} of {int(held_out.sum())} rows that it was not trained with")

    rows = table[held_out][:count]
    targets = network(rows).argmax(1)
    # In units of the standard deviation, each column has mean 0 and standard deviation 1.
    augmenter = spade_fast.NoiseAugmenter(mean=0.0, std=1.0, seed=0)
    spade = spade_fast.Spade(InputXGradient(network), augmenter)
    maps = {"input x gradient, dense network": InputXGradient(network).attribute(rows, target=targets)}
    maps["... on the row's own trace"] = spade.attribute(rows, target=targets)
    others = []
    for row, target, other in zip(rows.split(1), targets.tolist(), spade.traces[1:] + spade.traces[:1], strict=True):
        with other.applied(network):
            others.append(InputXGradient(network).attribute(row, target=target))
    maps["... on another row's trace (control)"] = torch.cat(others)
    maps["integrated gradients, dense network"] = IntegratedGradients(network).attribute(rows, target=targets)
    maps = {name: one.detach() for name, one in maps.items()}

    pruned = sum(made.sparsity for made in spade.traces) / count
    kept = sum(made.decision.kept for made in spade.traces)
    print(f"traces: {pruned:.0%} of the weights removed on average, decision kept on {kept} of {count} rows\n")

    print(f"{'%, mean over the rows':38}{'insertion':>9} over dense{'':10}{'deletion':>9} over dense")
    dense = areas(network, rows, next(iter(maps.values())), targets)
    for name, of_rows in maps.items():
        found = areas(network, rows, of_rows, targets)
        cells = [
            f"{float(mine.mean()):8.1f}  {difference(mine, base)}" for mine, base in zip(found, dense, strict=True)
        ]
        print(f"{name:38}{cells[0]}  {cells[1]}")

    probability = network(rows[:1]).softmax(1)[0, targets[0]].item()
    print(f"\nrow 0: {data.target_names[targets[0]]} ({probability:.1%}); the five columns that speak most for it")
    for name, one in maps.items():
        shares = 100 * one[0] / one[0].abs().sum()
        first = shares.argsort(descending=True)[:5].tolist()
        print(f"{name:38}{', '.join(f'{data.feature_names[i]} {shares[i]:.0f} %' for i in first)}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
