"""k-means and silhouettes, against slow and obvious ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvfactory import clustering
from kvfactory.clustering import cluster_sums, kmeans, ranks_within, silhouette, squared_distances


def blobs(batch: int, tokens: int, dim: int = 6, seed: int = 0, spread: float = 0.4) -> Tensor:
    """Points around a few places, off the origin."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.randn(batch, 7, dim, generator=generator) * 3 + 5
    which = torch.randint(7, (batch, tokens), generator=generator)
    noise = torch.randn(batch, tokens, dim, generator=generator) * spread
    return places[torch.arange(batch)[:, None], which] + noise


def lloyd(points: np.ndarray, centroids: np.ndarray, iterations: int) -> tuple[np.ndarray, list[int]]:
    """One point at a time, in float64."""
    labels: list[int] = []
    for step in range(iterations + 1):
        if step:
            for cluster in range(len(centroids)):
                its = [point for point, label in zip(points, labels, strict=True) if label == cluster]
                if its:
                    centroids[cluster] = np.mean(its, 0)
        labels = [int(np.argmin([((point - centroid) ** 2).sum() for centroid in centroids])) for point in points]
    return centroids, labels


def inertia(points: Tensor, centroids: Tensor, labels: Tensor) -> Tensor:
    return squared_distances(points, labels, centroids).sum(-1)


@pytest.mark.parametrize("iterations", [1, 3, 20])
def test_kmeans_is_lloyds(iterations: int) -> None:
    points = blobs(3, 90)
    start, first = kmeans(points, 8, iterations=0)
    centroids, labels = kmeans(points, 8, iterations=iterations)
    assert centroids.dtype == torch.float32 and labels.dtype == torch.int64
    for row in range(3):
        expected, expected_labels = lloyd(points[row].double().numpy(), start[row].double().numpy(), iterations)
        assert labels[row].tolist() == expected_labels
        assert first[row].tolist() == lloyd(points[row].double().numpy(), start[row].double().numpy(), 0)[1]
        torch.testing.assert_close(centroids[row].double(), torch.from_numpy(expected), rtol=1e-4, atol=1e-4)


@given(st.integers(2, 60), st.integers(1, 20), st.integers(0, 1000), st.sampled_from([None, 10, 25]))
@settings(max_examples=40)
def test_kmeans_of_anything(tokens: int, clusters: int, seed: int, sample: int | None) -> None:
    points = blobs(2, tokens, seed=seed).to(torch.bfloat16)
    centroids, labels = kmeans(points, clusters, sample_size=sample)
    k = min(clusters, tokens, sample or tokens)
    assert centroids.shape == (2, k, 6) and labels.shape == (2, tokens)
    assert centroids.isfinite().all() and labels.min() >= 0 and labels.max() < k
    own = squared_distances(points, labels, centroids)
    each = (points.float()[:, :, None] - centroids[:, None]).square().sum(-1)
    in_use = torch.zeros(2, k).scatter_(1, labels, 1.0).bool()
    torch.testing.assert_close(own, each.masked_fill(~in_use[:, None], torch.inf).amin(-1), rtol=1e-3, atol=1e-3)
    again = kmeans(points, clusters, sample_size=sample)
    assert torch.equal(again[0], centroids) and torch.equal(again[1], labels)


@given(st.integers(0, 1000))
@settings(max_examples=15)
def test_inertia_never_rises(seed: int) -> None:
    points = blobs(2, 80, seed=seed, spread=2)
    by_iteration = torch.stack([inertia(points, *kmeans(points, 9, iterations=count)) for count in range(8)])
    assert (by_iteration[1:] <= by_iteration[:-1] * (1 + 1e-5)).all()
    assert (by_iteration[-1] < by_iteration[0] * 0.97).all()


@pytest.mark.parametrize("sample", [None, 64])
def test_a_row_alone_is_the_row_in_a_batch(sample: int | None) -> None:
    points = torch.cat([blobs(4, 200, seed=3), torch.ones(1, 200, 6)])
    centroids, labels = kmeans(points, 12, sample_size=sample)
    for row in range(5):
        alone, alone_labels = kmeans(points[row : row + 1], 12, sample_size=sample)
        assert torch.equal(alone_labels[0], labels[row])
        torch.testing.assert_close(alone[0], centroids[row], rtol=1e-5, atol=1e-5)


@given(st.integers(1, 9), st.integers(1, 14), st.integers(0, 1000))
@settings(max_examples=40)
def test_points_that_are_the_same_are_one_cluster(distinct: int, clusters: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    places = torch.randn(3, distinct, 40, generator=generator) * 4 + 9
    which = torch.randint(distinct, (3, 50), generator=generator)
    which[:, :distinct] = torch.arange(distinct)
    centroids, labels = kmeans(places[torch.arange(3)[:, None], which], clusters)
    assert centroids.isfinite().all()
    for row in range(3):
        pairs = set(zip(which[row].tolist(), labels[row].tolist(), strict=True))
        assert len(pairs) == distinct, "equal points have equal labels"
        assert len({label for _, label in pairs}) == min(distinct, clusters)


def test_the_start_spreads_out() -> None:
    """With as many centroids as places far from each other every place has one; by even chances that is rare."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        which = torch.randint(20, (1, 300), generator=generator) % 8
        points = torch.eye(8)[which] * 100 + torch.randn(1, 300, 8, generator=generator)
        start, _ = kmeans(points, 8, iterations=0)
        assert len(set(start[0].argmax(-1).tolist())) == 8


def test_the_first_centroids_are_drawn_by_chance() -> None:
    picked = [kmeans(torch.arange(tokens)[None, :, None], 1, iterations=0)[0].item() for tokens in range(20, 60)]
    assert len(set(picked)) > 1


def test_a_cluster_that_loses_its_last_point_stays_empty() -> None:
    points, centroids = torch.tensor([[[0.0], [1.0], [10.0]]]), torch.tensor([[[0.5], [0.6], [10.0]]])
    sizes = torch.tensor([[0.0, 2.0, 1.0]])
    assert clustering.nearest(points, centroids, sizes).tolist() == [[1, 1, 2]]
    means, counted = clustering._means(points, torch.tensor([[1, 1, 2]]), centroids)
    assert torch.equal(counted, sizes)
    torch.testing.assert_close(means, torch.tensor([[[0.5], [0.5], [10.0]]]))


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=30))
@settings(max_examples=50)
def test_ranks_and_sums(pairs: list[tuple[int, int]]) -> None:
    labels = torch.tensor([[label for label, _ in pairs]] * 2)
    quality = torch.tensor([[float(value) for _, value in pairs], [-float(value) for _, value in pairs]])
    ranks, sums = ranks_within(labels, quality), cluster_sums(quality, labels, 5)
    for row in range(2):
        for cluster in range(5):
            its = [token for token in range(len(pairs)) if labels[row, token] == cluster]
            best_first = sorted(its, key=lambda token: -float(quality[row, token]))
            assert [int(ranks[row, token]) for token in best_first] == list(range(len(its)))
            assert sums[row, cluster] == sum(float(quality[row, token]) for token in its)


def slow_silhouette(points: Tensor, labels: list[int]) -> float:
    """From its definition, in float64."""
    total = 0.0
    for token, label in enumerate(labels):
        away: dict[int, list[float]] = {}
        for other, its in enumerate(labels):
            if other != token:
                away.setdefault(its, []).append(float((points[token] - points[other]).double().norm()))
        others = [float(np.mean(values)) for its, values in away.items() if its != label]
        if label in away and others:
            a, b = float(np.mean(away[label])), min(others)
            total += (b - a) / max(a, b) if max(a, b) else 0.0
    return total / len(labels)


@given(st.integers(1, 25), st.integers(1, 6), st.integers(0, 1000), st.sampled_from([1, 40, 2**21]))
@settings(max_examples=40)
def test_silhouette_is_its_definition(tokens: int, clusters: int, seed: int, chunk: int) -> None:
    points = blobs(3, tokens, seed=seed)
    labels = torch.randint(clusters, (3, tokens), generator=torch.Generator().manual_seed(seed))
    expected = torch.tensor([slow_silhouette(*row) for row in zip(points, labels.tolist(), strict=True)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clustering, "CHUNK", chunk)
        torch.testing.assert_close(silhouette(points, labels), expected, rtol=1e-3, atol=1e-4)


def test_silhouette_by_hand() -> None:
    points = torch.tensor([[[0.0], [1.0], [10.0]], [[2.0], [2.0], [2.0]]])
    # a pair 1 apart, 10 and 9 from a third that is alone; then points that are all the same
    labels = torch.tensor([[0, 0, 4], [0, 0, 1]])
    expected = torch.tensor([((10 - 1) / 10 + (9 - 1) / 9) / 3, 0.0])
    torch.testing.assert_close(silhouette(points, labels), expected)
    good = blobs(1, 150, spread=0.1)
    labels = kmeans(good, 7, iterations=10)[1]
    assert silhouette(good, labels) > 0.8 > 0.2 > silhouette(good, labels.roll(40, 1)).item()
