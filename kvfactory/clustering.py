"""Groups of points: k-means, and how well a grouping fits.

Rows of a batch know nothing of each other: what a row gets does not depend on what is beside it, and is the same each time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .indexing import entries

SEED = 0
"""Of the numbers that draw the first centroids, the same ones for every row."""
SAME = 1e-5
"""The square of a distance, in squares of a point's norm, below which two points are one and the same."""
FAR = 1e20
"""The square of a distance to no centroid at all."""
CHUNK = 2**21
"""Distances that are held at once while they are summed."""


def kmeans(
    points: Tensor, clusters: int, *, iterations: int = 4, sample_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Lloyd's k-means from a k-means++ start: centroids [batch, k, dim], float32, and labels [batch, n], int64.

    Points are [batch, n, dim], 1 or more in each row; k is `clusters`, or the number of points that centroids are fitted
    to if that is smaller. Those are all n, or at most `sample_size` evenly spaced ones; labels name the nearest centroid of
    every point. It stops after so many `iterations`, or when no label changes. A cluster that has lost its last point stays
    empty and keeps its last centroid; so does one that never had any, because fewer than k points differ.
    """
    fitted = points = points.float()
    if sample_size is not None and sample_size < points.shape[1]:
        fitted = points.index_select(
            1, torch.arange(sample_size, device=points.device) * points.shape[1] // sample_size
        )
    centre = fitted.mean(1, keepdim=True)  # products of small numbers round less
    fitted = fitted - centre
    centroids, labels = _start(fitted, min(clusters, fitted.shape[1]))
    for _ in range(iterations):
        centroids, sizes = _means(fitted, labels, centroids)
        labels, before = nearest(fitted, centroids, sizes), labels
        if torch.equal(labels, before):
            break
    centroids = centroids + centre
    if fitted.shape != points.shape:
        labels = nearest(points, centroids, members(labels, centroids.shape[1]).sum(1))
    return centroids, labels


def _start(points: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Centroids drawn from the points, each with a chance that grows with the square of its distance to those before it.

    With the labels of all points. A centroid that repeats another, as all do once no point is left that differs, gets none.
    """
    batch, tokens, _ = points.shape
    # the point with the largest weight over an exponential number is one drawn in proportion to the weights
    uniform = torch.rand(clusters, tokens, generator=torch.Generator().manual_seed(SEED)).clamp(min=1e-7)
    luck = -1 / uniform.log().to(points.device)
    left, right = _factors(points)
    first = tokens * torch.arange(batch, device=points.device)
    away, drawn, distances = points.new_full((batch, tokens), FAR), [], []
    for draw in luck:
        drawn.append((away * draw).argmax(1) + first)
        seed = left.flatten(0, 1).index_select(0, drawn[-1])
        distances.append(torch.bmm(seed[:, None], right.mT)[:, 0].clamp_(min=0))
        away = torch.minimum(away, distances[-1])
    labels = torch.stack(distances, 1).min(1).indices  # the first of equal ones
    return points.flatten(0, 1)[torch.stack(drawn, 1)], labels


def _factors(points: Tensor) -> tuple[Tensor, Tensor]:
    """Two tensors [batch, n, dim + 2]; products of their rows are squares of distances, below 0 for equal points."""
    norms = points.square().sum(-1, keepdim=True)
    ones = torch.ones_like(norms)
    # less SAME, or rounding would leave something between points that are equal
    return torch.cat([-2 * points, ones, norms], -1), torch.cat([points, norms * (1 - SAME), ones], -1)


def nearest(points: Tensor, centroids: Tensor, sizes: Tensor) -> Tensor:
    """The nearest centroid of each point, [batch, n], int64, those of size 0 left out: sizes are [batch, k]."""
    half_norms = (centroids.square().sum(-1) / 2).masked_fill(sizes == 0, torch.inf)
    return torch.baddbmm(half_norms[:, None], points, centroids.mT, alpha=-1).argmin(-1)


def _means(points: Tensor, labels: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of each cluster's points, or its last centroid if there is none, and how many there are, [batch, k]."""
    of_cluster = members(labels, centroids.shape[1])
    sizes = of_cluster.sum(1)
    means = of_cluster.mT @ points / sizes[..., None].clamp(min=1)
    return torch.where(sizes[..., None] > 0, means, centroids), sizes


def cluster_sums(values: Tensor, labels: Tensor, clusters: int) -> Tensor:
    """The sum of each cluster's values, [batch, clusters], float32; values and labels are [batch, n]."""
    # a product, because sums by index are in another order each time on a GPU
    return (values.float()[:, None] @ members(labels, clusters))[:, 0]


def members(labels: Tensor, clusters: int) -> Tensor:
    """1 where a point [batch, n] has the label and 0 elsewhere, [batch, n, clusters], float32."""
    zeros = torch.zeros(*labels.shape, clusters, device=labels.device)
    return zeros.scatter_(2, labels[..., None], 1.0)


def squared_distances(points: Tensor, labels: Tensor, centroids: Tensor) -> Tensor:
    """The square of each point's distance to the centroid that its label names, [batch, n], float32."""
    away = entries(centroids, labels).sub_(points)  # in place: at this size new memory takes longer than the numbers
    return torch.linalg.vector_norm(away, dim=-1).square_()


def ranks_within(labels: Tensor, quality: Tensor) -> Tensor:
    """The place of each point among its cluster's points, 0 for the highest quality, [batch, n], int64.

    Labels and quality are [batch, n]; of equal points the first comes first.
    """
    by_quality = quality.argsort(dim=-1, descending=True, stable=True)
    grouped = by_quality.gather(1, labels.gather(1, by_quality).argsort(dim=-1, stable=True))
    label = labels.gather(1, grouped)
    place = torch.arange(labels.shape[1], device=labels.device).expand_as(label)
    starts = torch.searchsorted(label, label)
    return torch.empty_like(labels).scatter_(1, grouped, place - starts)


def silhouette(points: Tensor, labels: Tensor) -> Tensor:
    """Mean silhouette of each row, [batch], float32, from -1 to 1: (b - a) / max(a, b), averaged over its points.

    a is a point's mean distance to the others of its cluster and b the smallest of its mean distances to other clusters. A
    point that is alone in its cluster counts 0, and so do all where there is one cluster. Points are [batch, n, dim], labels
    [batch, n]. Distances are those of all pairs; memory is that of `CHUNK` of them, or of one point's for each row.
    """
    batch, tokens, _ = points.shape
    left, right = _factors(points.float() - points.float().mean(1, keepdim=True))
    of_cluster = members(labels, int(labels.max()) + 1)
    sizes = of_cluster.sum(1, keepdim=True)
    total = left.new_zeros(batch)
    for rows in torch.arange(tokens, device=points.device).split(max(1, CHUNK // (batch * tokens))):
        sums = (left[:, rows] @ right.mT).clamp_(min=0).sqrt_() @ of_cluster
        own = of_cluster[:, rows] > 0
        others = (sizes - 1).clamp(min=1)
        inside = (sums / others)[own].view(batch, -1)
        outside = (sums / sizes).masked_fill(own | (sizes == 0), torch.inf).amin(-1)
        larger = inside.maximum(outside).clamp(min=torch.finfo(torch.float32).tiny)
        alone = sizes.expand_as(sums)[own].view(batch, -1) == 1
        each = (outside - inside) / larger
        total += each.masked_fill(alone | outside.isinf(), 0.0).sum(1)
    return total / tokens
