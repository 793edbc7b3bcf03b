"""The update in float64, dense and one block at a time: slow, but short enough to read beside the paper.

It shares no code with `shampoo/`. Bias corrections are deliberately rounded to float32, as in the competition's update.
"""

from itertools import product

import numpy as np


def correction(beta, t):
    return 1.0 if beta == 1 else float(np.float32(1) - np.float32(beta) ** np.float32(t))


def merged(shape, limit, merge, ratio):
    if (
        ratio is not None and merge
    ):  # from the last dimension; a merged one, d, has d^2 <= ratio n in a full block of n elements
        limit = min(limit, (ratio * np.prod([min(n, limit) for n in shape])) ** 0.5)
        return merged(shape[::-1], limit, merge, None)[::-1]
    out = []
    for n in shape if merge else []:
        if n != 1 and out and out[-1] * n <= limit:
            out[-1] *= n
        elif n != 1:
            out.append(n)
    return tuple(out if merge else shape) or (1,)


def slices(shape, size):
    return list(product(*[[slice(a, min(a + size, n)) for a in range(0, n, size)] for n in shape]))


def kept_dims(shape, o, allowed):
    """Return the dimensions of a block that have factors."""
    if not allowed or (len(shape) == 1 and (not o["precondition_vectors"] or o["preconditioner"] == "soap")):
        return []
    return [d for d, n in enumerate(shape) if o["max_factor_ratio"] is None or n * n <= o["max_factor_ratio"] * np.prod(shape)]


def power_of(order, d, exponents, multiplier, kept):
    if exponents is None:
        return multiplier / max(2 * kept, 1)
    if not isinstance(exponents, tuple):
        return multiplier * exponents
    left, right = exponents
    return multiplier * (left + right if order == 1 else left if d == 0 else right / (order - 1))


def root(A, p, eps):
    lam, Q = np.linalg.eigh(A)
    return (Q * (lam - min(lam.min(), 0) + eps) ** -p) @ Q.T


def along(X, G, d):
    """Return sum_j X_ij G_..j.. along dimension d."""
    return np.moveaxis(np.tensordot(X, G, (1, d)), 0, d)


class Block:
    def __init__(self, shape, o, allowed):
        kept = kept_dims(shape, o, allowed)
        self.factored, self.graft = bool(kept), o["grafting"]
        if not kept and self.graft in ("none", "sgd"):
            self.graft = "adam"
        powers = [power_of(len(shape), d, o["exponents"], o["exponent_multiplier"], len(kept)) for d in range(len(shape))]
        self.powers = [p if d in kept else 0 for d, p in enumerate(powers)]
        self.soap = kept and o["preconditioner"] == "soap"
        self.Q = [np.eye(n) for n in shape]
        self.A = [np.zeros((n, n)) for n in shape]
        self.X = [np.zeros((n, n)) for n in shape]
        self.M, self.V, self.B = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        self.n, self.rooted = 0, False

    def step(self, G, W, t, lr, o):
        """Return the new weights. With G None, for a missing gradient, only the roots are refreshed."""
        (b1, b2), wd, k = o["betas"], o["weight_decay"], o["precondition_frequency"]
        every = o["factor_frequency"]
        start = o["start_preconditioning_step"] or (1 if o["preconditioner"] == "soap" else k)
        gb2 = b2 if o["grafting_beta2"] is None else o["grafting_beta2"]
        gb2 = gb2 if self.factored or o["unfactored_beta2"] is None else o["unfactored_beta2"]
        gb2 = 1.0 if self.graft == "adagrad" else gb2
        present = G is not None
        self.n += present  # bias corrections count a parameter's own gradients
        n = self.n
        bc1 = correction(b1, n) if o["bias_correction"] else 1.0
        if present:
            G = G + wd * W if not o["decoupled_weight_decay"] else G
            for d, A in enumerate(self.A if n % every == 1 % every else []):
                U, size = G, G.shape[d]
                if o["covariance"] == "kl":
                    for e, X in enumerate(self.X if self.rooted else []):
                        U = U if e == d or self.powers[e] == 0 else along(X, U, e)
                    U = U * (size / G.size) ** 0.5
                U = np.moveaxis(U, d, 0).reshape(size, -1)
                self.A[d] = A + U @ U.T if b2 == 1 else b2**every * A + (1 - b2**every) * U @ U.T
        if n and (t == start or (t > start and t % k == 0) or (t > start and not self.rooted)):
            self.rooted = True
            bc2 = correction(b2, every * -(-n // every)) if o["bias_correction"] else 1.0
            if self.soap:
                self.turn(o["solver"])
            self.X = [
                root(A / bc2, p, o["eps"] * (np.trace(A / bc2) if o["relative_eps"] else 1))
                for A, p in zip(self.A, self.powers)
            ]
        if not present:
            return W
        g = G / (np.linalg.norm(G) + 1e-16) if o["normalized_grafting"] else self.rotate(G) if self.soap else G
        self.V = self.V + g * g if gb2 == 1 else gb2 * self.V + (1 - gb2) * g * g
        self.M = b1 * self.M + (1 - b1) * G
        N = (b1 * self.M + (1 - b1) * G if o["nadam"] else self.M) / bc1 if b1 else G
        if not self.factored or (t < start and self.graft != "none"):
            P = self.grafted(N, gb2, n, o)
        elif self.soap:
            P = self.grafted(self.rotate(N), gb2, n, o)
            for d, Q in enumerate(self.Q):
                P = along(Q, P, d)
        else:
            P = N
            for d, (X, p) in enumerate(zip(self.X, self.powers)):
                P = P if p == 0 else along(X, P, d)
            if self.graft != "none":
                length = np.linalg.norm(self.grafted(g if o["normalized_grafting"] else N, gb2, n, o))
                P = P * length / (np.linalg.norm(P) + 1e-16)
        if o["decoupled_weight_decay"]:
            P = P + wd * W * (P * W > 0 if o["cautious_decay"] else 1)
        mu = o["momentum"]
        if mu:
            self.B = mu * self.B + (1 - mu) * P
            P = (1 - mu) * P + mu * self.B if o["nesterov"] else self.B
        return W - lr * P

    def rotate(self, G):
        for d, Q in enumerate(self.Q):
            G = along(Q.T, G, d)
        return G

    def turn(self, solver):
        """Compute the bases for the first time, or again with eigh, or update them as SOAP does, with V's entries."""
        for d, (A, Q, p) in enumerate(zip(self.A, self.Q, self.powers)):
            if p and (solver in ("auto", "eigh") or np.array_equal(Q, np.eye(len(Q)))):
                self.Q[d] = np.linalg.eigh(A)[1][:, ::-1]
            elif p:
                Z = A @ Q
                order = np.argsort(-(Q * Z).sum(0), kind="stable")
                self.V = np.take(self.V, order, axis=d)
                self.Q[d] = np.linalg.qr(Z[:, order])[0]

    def grafted(self, N, gb2, n, o):
        if self.graft in ("none", "sgd"):
            return N
        return N / (np.sqrt(self.V / (correction(gb2, n) if self.graft == "adam" else 1)) + o["grafting_eps"])


def trajectory(weights, gradients, lrs, options):
    """Return the float64 weights after each step; gradients[t][i] is an array, or None if parameter i has none at step t."""
    o = options
    W = [np.array(w, dtype=np.float64) for w in weights]
    shapes = [merged(w.shape, o["block_size"], o["merge_dims"], o["max_factor_ratio"]) for w in W]
    blocks = [
        [
            (s, Block(np.zeros(shape)[s].shape, o, max(w.shape, default=1) < o["max_dim"]))
            for s in slices(shape, o["block_size"])
        ]
        for w, shape in zip(W, shapes)
    ]
    t, out = 0, []
    for grads, lr in zip(gradients, lrs):
        t += any(g is not None for g in grads)
        for i, (g, shape) in enumerate(zip(grads, shapes)):
            w, g = W[i].reshape(shape).copy(), None if g is None else np.float64(g).reshape(shape)
            for s, block in blocks[i] if any(x is not None for x in grads) else []:
                w[s] = block.step(None if g is None else g[s], w[s], t, lr, o)
            W[i] = w.reshape(W[i].shape)
        out.append([w.copy() for w in W])
    return out
