"""An ensemble of small models, one for each cluster of texts, mixed by how near a text is.

python -m explorer.survey.from_scratch.ensemble --out runs/ensemble

c-BTM (Gururangan et al. 2023, "Scaling Expert Language Models with Unsupervised Domain Discovery",
arXiv:2303.14177): texts are clustered without labels, copies of one model that learned on all of
them learn on one cluster each, and ``p(token) = sum_c w_c p_c(token)`` with
``w = softmax(-d^2 / T)``, d the distance of the text so far from the centre of cluster c. Beside it
stand a single model that takes as many training steps as all of them together, and an ensemble of
texts divided by chance.
"""

import argparse
import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import Normalizer
from tokenizers import Tokenizer

from capture.demo.streams import BOS, encode_texts
from capture.paths import path_argument
from capture.prompts import read_prompts
from explorer.errors import RouterError
from explorer.routers.assignment import balanced_assignment
from explorer.survey.from_scratch.arms import ARMS, Ints
from explorer.survey.from_scratch.model import ScratchModel
from explorer.survey.from_scratch.train import (
    Corpus,
    Setting,
    facts_of,
    kept,
    learn_tokenizer,
    seeds_of,
    train,
)

Floats = npt.NDArray[np.float64]
TEMPERATURE = 0.1  # the paper's default
DIMENSIONS = 100
ROUNDS = 2  # k-means has found the places; these make the sizes equal
PREFIX = 32  # tokens that the weights of a text are read from; the loss is of those after them
BATCH = 32
STEPS = 800


class Clusters:
    """Balanced k-means on tf-idf, as in the paper.

    Parameters
    ----------
    n_clusters, seed : int

    Attributes
    ----------
    centres_ : array [C, 100]
    labels_ : array [N], int64
        Clusters of the texts it was fitted on, of equal size or one more.
    """

    features: Pipeline
    centres_: Floats
    labels_: Ints

    def __init__(self, n_clusters: int, *, seed: int = 0) -> None:
        self.n_clusters, self.seed = n_clusters, seed

    def fit(self, texts: Sequence[str]) -> Self:
        """Find the clusters of texts."""
        tfidf = TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 3), max_features=20_000)
        whole = tfidf.fit_transform(texts)
        n_components = min(DIMENSIONS, min(whole.shape) - 1)
        svd = TruncatedSVD(n_components, random_state=self.seed)
        self.features = make_pipeline(tfidf, svd, Normalizer())
        points = Normalizer().fit_transform(svd.fit_transform(whole))
        kmeans = KMeans(self.n_clusters, n_init=4, random_state=self.seed).fit(points)
        self.centres_ = kmeans.cluster_centers_
        for _ in range(ROUNDS):
            self.labels_ = balanced_assignment(-_squared(points, self.centres_), 1)[:, 0]
            self.centres_ = np.stack(
                [points[self.labels_ == c].mean(axis=0) for c in range(self.n_clusters)]
            )
        return self

    def squared_distances(self, texts: Sequence[str]) -> Floats:
        """Return the squared distance of each text from each centre, [N, C]."""
        return _squared(self.features.transform(texts), self.centres_)


def _squared(points: Floats, centres: Floats) -> Floats:
    found: Floats = ((points[:, None] - centres[None]) ** 2).sum(axis=-1)
    return found


def mixture(squared: npt.ArrayLike, temperature: float) -> torch.Tensor:
    """Return the weight of each model for each text, ``softmax(-d^2 / T)`` [N, C].

    Parameters
    ----------
    squared : array [N, C]
    temperature : float
        0 = the nearest alone; infinite = all alike.
    """
    distances = torch.as_tensor(np.asarray(squared), dtype=torch.float64)
    if temperature == 0:
        nearest = distances.argmin(dim=-1)
        return torch.nn.functional.one_hot(nearest, distances.shape[-1]).double()
    return (-distances / temperature).softmax(dim=-1)


def mixed_losses(log_probabilities: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the loss of a mixture, ``-log sum_c w_c p_c``.

    Parameters
    ----------
    log_probabilities : Tensor [C, N, S], nats
        Of the tokens that came, by each model.
    weights : Tensor [N, C]

    Returns
    -------
    Tensor [N, S]
    """
    return -(log_probabilities.double() + weights.T.log()[:, :, None]).logsumexp(dim=0)


class HeldOutTexts(NamedTuple):
    """Texts to score: token windows and what their first tokens say.

    Attributes
    ----------
    windows : Tensor [N, S + 1], int64
        Shorter texts end in zeros.
    scored : Tensor [N, S], bool
        Targets after the prefix that are no filling.
    prefixes : list of str
    """

    windows: torch.Tensor
    scored: torch.Tensor
    prefixes: list[str]


def held_out_texts(tokenizer: Tokenizer, texts: Sequence[str], context: int) -> HeldOutTexts:
    """Cut texts to windows of ``context`` tokens; those that end with the prefix are left out."""
    rows, scored, prefixes = [], [], []
    for encoding in tokenizer.encode_batch(list(texts)):
        ids = [BOS, *encoding.ids][: context + 1]
        if len(ids) <= PREFIX + 1:
            continue
        filling = context + 1 - len(ids)
        rows.append(ids + [0] * filling)
        scored.append([PREFIX <= at < len(ids) - 1 for at in range(context)])
        prefixes.append(tokenizer.decode(ids[1 : PREFIX + 1]))
    return HeldOutTexts(torch.tensor(rows), torch.tensor(scored), prefixes)


@torch.no_grad()
def log_probabilities(model: ScratchModel, windows: torch.Tensor) -> torch.Tensor:
    """Return the log probability of every token that came, [N, S], nats."""
    parts = []
    for part in torch.split(windows, BATCH):
        facts = facts_of(part, "token", model.embedding.num_embeddings)
        logits = model(part[:, :-1], facts).log_softmax(dim=-1)
        parts.append(logits.gather(-1, part[:, 1:, None])[..., 0])
    return torch.cat(parts)


@dataclass(frozen=True)
class EnsemblePlan:
    """What is compared.

    Attributes
    ----------
    clusters : int
        Models of an ensemble.
    setting : Setting
        Half of its steps go to the model that is copied, the rest in equal shares to the copies.
    """

    clusters: int = 4
    setting: Setting = field(default_factory=Setting)


def compared(
    plan: EnsemblePlan, fit: list[str], held_out: list[str], seed: int
) -> list[dict[str, Any]]:
    """Train all models of one seed and return the held-out loss of each way to use them.

    Returns
    -------
    list of dict
        ``model, seed, loss`` (nats a token), ``run`` (models that run for a token).
    """
    shape = plan.setting.shape
    tokenizer = learn_tokenizer(fit, shape.vocabulary)
    texts = held_out_texts(tokenizer, held_out, shape.context)
    clusters = Clusters(plan.clusters, seed=seed).fit(fit)
    by_chance = np.random.default_rng(seed).permutation(clusters.labels_)

    def trained(chosen: list[str], steps: int, start: ScratchModel | None = None) -> ScratchModel:
        stream = encode_texts(tokenizer, chosen).astype(np.int64)
        setting = Setting(steps=steps, windows=plan.setting.windows, shape=shape)
        return train(ARMS["dense"], setting, Corpus(stream, stream), seed, start=start)

    def ensemble(labels: Ints) -> torch.Tensor:
        parts = []
        for cluster in range(plan.clusters):
            chosen = [text for text, label in zip(fit, labels, strict=True) if label == cluster]
            copy = trained(chosen, (plan.setting.steps - half) // plan.clusters, common)
            parts.append(log_probabilities(copy, texts.windows))
        return torch.stack(parts)

    half = plan.setting.steps // 2
    common = trained(fit, half)
    alone = log_probabilities(trained(fit, plan.setting.steps), texts.windows)
    near, mixed = ensemble(clusters.labels_), ensemble(by_chance)
    squared = clusters.squared_distances(texts.prefixes)
    uses = {
        "one model": (alone[None], torch.ones(len(squared), 1, dtype=torch.float64)),
        "clusters, T = 0.1": (near, mixture(squared, TEMPERATURE)),
        "clusters, nearest": (near, mixture(squared, 0.0)),
        "clusters, all alike": (near, mixture(squared, np.inf)),
        "by chance, all alike": (mixed, mixture(squared, np.inf)),
    }
    return [
        {
            "model": name,
            "seed": seed,
            "loss": float(mixed_losses(found, weights)[texts.scored].mean()),
            "run": float((weights > 0.01).sum(dim=-1).double().mean()),
        }
        for name, (found, weights) in uses.items()
    ]


def table(results: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Return means over seeds, and the difference from one model with its standard error."""
    frame = pd.DataFrame(results)
    losses = frame.pivot(index="seed", columns="model", values="loss")
    against = losses.sub(losses["one model"], axis=0)
    means = frame.groupby("model", sort=False)[["loss", "run"]].mean()
    means["minus one model"] = against.mean()
    means["se"] = against.std(ddof=1) / np.sqrt(len(against))
    return means.reset_index()


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is missing and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m explorer.survey.from_scratch.ensemble",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--clusters", type=int, default=4, help="default: 4")
    parser.add_argument("--seeds", default="0,1,2", metavar="0,1", help="default: 0,1,2")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"in all; default: {STEPS}")
    parser.add_argument(
        "--out", type=path_argument, required=True, metavar="FOLDER", help="keeps figures"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # models this small are slower on several
    if options.clusters < 2:
        parser.error(f"expected at least 2 clusters, got {options.clusters}")
    try:
        seeds = seeds_of(options.seeds)
    except RouterError as error:
        parser.error(str(error))
    plan = EnsemblePlan(options.clusters, Setting(steps=options.steps))
    fit, held_out = (
        [str(prompt.text) for prompt in read_prompts(name)] for name in ("demo-fit", "demo-heldout")
    )
    results: list[dict[str, Any]] = []
    for seed in seeds:
        file = options.out / f"ensemble-{plan.clusters}-{seed}-{plan.setting.key}.json"
        results += kept(file, functools.partial(compared, plan, fit, held_out, seed))
    text = table(results).to_string(
        index=False, na_rep="–", float_format=lambda value: f"{value:.4f}"
    )
    sys.stdout.write(f"{text}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
