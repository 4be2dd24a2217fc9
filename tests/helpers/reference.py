"""CurvaDion as plainly as possible: several replicas simulated in one process, one matrix at a time, float64."""

import math

import torch
from torch import Tensor

from lightning_curvadion.optim.dion import initial_right_factor


def orthonormal(Y: Tensor) -> Tensor:
    P, triangle = torch.linalg.qr(Y)
    return P * torch.where(triangle.diagonal() < 0, -1.0, 1.0)


def unit(R: Tensor, eps: float = 1e-8) -> Tensor:
    return R / (R.norm(dim=0) + eps)


def step_along(R: Tensor, eps: float = 1e-8) -> Tensor:
    lengths = R.norm(dim=0)
    return R / (lengths.clamp_min(3e-3 * lengths.max()) + eps)


def root_of_gram(M: Tensor) -> Tensor:
    """``(M^T M)^(1/2)`` of a tall matrix, by the Newton-Schulz iterations of Muon."""
    X = M / (M.norm() + 1e-8)
    for _ in range(5):
        gram = X.T @ X
        X = 3.4445 * X + X @ (-4.7750 * gram + 2.0315 * gram @ gram)
    return X.T @ M


def mean(tensors: list[Tensor]) -> Tensor:
    return sum(tensors) / len(tensors)


class Matrix:
    """One matrix on all replicas, always at least as tall as wide."""

    def __init__(self, start: Tensor, world: int, rank_fraction: float, seed: int) -> None:
        m, n = start.shape
        self.wide, self.scale = m < n, math.sqrt(m / n)
        self.X = [(start.T if self.wide else start).clone() for _ in range(world)]
        rank = math.ceil(rank_fraction * min(m, n))
        self.dense = rank * (m + n) >= m * n
        self.anchor = self.X[0].clone()
        self.travel = 0.0
        self.M = [torch.zeros_like(self.X[0]) for _ in range(world)]
        self.Q = [initial_right_factor(min(m, n), rank, seed, start) for _ in range(world)]

    def step(self, gradients: list[Tensor], sync: bool, momentum: str, consensus: str, lr: float, mu: float, wd: float):
        B = [M + (G.T if self.wide else G) for M, G in zip(self.M, gradients, strict=True)]
        replicas = range(len(B))
        # Displacements meet with the momentum: around the step where that is each replica's own.
        through_factors = sync and consensus == "factors"
        P_displacement = self.common_basis() if through_factors and momentum != "local" else None
        if through_factors and momentum in ("factors", "dion"):
            self.meet_through_factors(P_displacement)
        if not sync or momentum in ("displacement", "local"):
            P = [orthonormal(B[i] @ self.Q[i]) for i in replicas]
            R = [B[i].T @ P[i] for i in replicas]
        elif momentum == "average":
            B = [mean(B)] * len(B)
            P = [orthonormal(B[0] @ mean(self.Q))] * len(B)
            R = [B[0].T @ P[0]] * len(B)
        else:
            shared_Q = all(torch.equal(Q, self.Q[0]) for Q in self.Q)
            P = [orthonormal(mean([B[i] @ self.Q[i] for i in replicas]))] * len(B)
            R = [mean([B[i].T @ P[i] for i in replicas])] * len(B)
            if momentum == "factors" and self.dense and shared_Q:
                B = [mean(B)] * len(B)
            elif momentum == "factors":
                B = [B[i] + P[i] @ (R[i] - B[i].T @ P[i]).T for i in replicas]
        for i in replicas:
            self.M[i] = B[i] - (1 - mu) * P[i] @ R[i].T
            self.Q[i] = unit(R[i])
            self.X[i] = (1 - lr * wd) * self.X[i] - lr * self.scale * P[i] @ step_along(R[i]).T
        if through_factors and momentum in ("average", "local"):
            self.meet_through_factors(self.common_basis() if P_displacement is None else P_displacement)
        self.travel += lr
        if sync and consensus == "average":
            if momentum == "displacement":
                steps = [(own - mean(self.X)) / (self.scale * self.travel) for own in self.X]
                self.M = [M + step @ root_of_gram(M) for M, step in zip(self.M, steps, strict=True)]
            self.X = [mean(self.X)] * len(B)
            self.travel = 0.0

    def common_basis(self) -> Tensor:
        return orthonormal(mean([(X - self.anchor) @ Q for X, Q in zip(self.X, self.Q, strict=True)]))

    def meet_through_factors(self, P: Tensor) -> None:
        R = [(X - self.anchor).T @ P for X in self.X]
        self.X = [X + P @ (mean(R) - own).T for X, own in zip(self.X, R, strict=True)]
        self.anchor = self.anchor + P @ mean(R).T

    def state(self, replica: int) -> list[Tensor]:
        """X, M and Q as the optimizer keeps them."""
        turn = (lambda tensor: tensor.T) if self.wide else (lambda tensor: tensor)
        return [turn(self.X[replica]), turn(self.M[replica]), self.Q[replica]]
