"""Merge methods in plain PyTorch, step by step as their authors' code does them.

What `merge_ops` compares speed and memory with. Each is `method(params_0, taus)` of
dicts of tensors, and returns the merged dict. Where the authors join all parameters
into one vector, so does this. PCB and AWD are missing: on whole vectors they need more
than eight copies of all task vectors.
"""

import torch


def average(params_0, taus):
    return task_arithmetic(params_0, taus, coef=1 / len(taus))


def task_arithmetic(params_0, taus, coef=0.3):
    total = {path: torch.zeros_like(leaf) for path, leaf in params_0.items()}
    for tau in taus:
        for path, leaf in tau.items():
            total[path] += leaf
    return {path: leaf + coef * total[path] for path, leaf in params_0.items()}


def joined(tau):
    return torch.cat([tau[path].flatten() for path in sorted(tau)])


def split(vector, like):
    parts = vector.split([like[path].numel() for path in sorted(like)])
    named = zip(sorted(like), parts, strict=True)
    return {path: part.reshape(like[path].shape) for path, part in named}


def added(params_0, vector, coef=1.0):
    moves = split(vector, params_0)
    return {path: leaf + coef * moves[path] for path, leaf in params_0.items()}


def trimmed(vectors, density):
    size = vectors.shape[1]
    rank = size - int(size * density)
    thresholds = vectors.abs().kthvalue(rank, dim=1, keepdim=True).values
    return vectors * (vectors.abs() >= thresholds)


def ties_vector(vectors, density, aggregate):
    vectors = trimmed(vectors, density)
    signs = torch.sign(vectors.sum(dim=0))
    signs[signs == 0] = torch.sign(signs.sum())
    agree = torch.where(signs.unsqueeze(0) > 0, vectors > 0, vectors < 0)
    kept = vectors * agree
    if aggregate == "sum":
        return kept.sum(dim=0)
    counts = (kept != 0).sum(dim=0).float()
    return kept.sum(dim=0) / torch.clamp(counts, min=1)


def ties(params_0, taus, density=0.2):
    vectors = torch.vstack([joined(tau) for tau in taus])
    return added(params_0, ties_vector(vectors, density, "mean"))


def dare(params_0, taus, drop_rate=0.9, coef=0.3):
    merged = dict(params_0)
    for tau in taus:
        for path, leaf in tau.items():
            mask = torch.bernoulli(torch.full_like(leaf, drop_rate))
            dropped = leaf * (1 - mask) / (1 - drop_rate)
            merged[path] = merged[path] + coef * dropped
    return merged


def magmax(params_0, taus, coef=0.5):
    merged = {}
    for path, leaf in params_0.items():
        stacked = torch.stack([tau[path] for tau in taus])
        largest = stacked.abs().argmax(dim=0, keepdim=True)
        merged[path] = leaf + coef * stacked.gather(0, largest).squeeze(0)
    return merged


def model_stock(params_0, taus):
    merged = {}
    count = len(taus)
    for path, leaf in params_0.items():
        moves = torch.stack([tau[path].flatten() for tau in taus])
        unit = torch.nn.functional.normalize(moves, dim=1)
        cosines = unit @ unit.T
        cosine = (cosines.sum() - count) / (count * (count - 1))
        share = count * cosine / (1 + (count - 1) * cosine)
        merged[path] = leaf + share * moves.mean(dim=0).reshape(leaf.shape)
    return merged


def emr(params_0, taus):
    """The unified vector; masks and rescalers are made as well, and dropped."""
    vectors = torch.vstack([joined(tau) for tau in taus])
    signs = torch.sign(vectors.sum(dim=0))
    unified = torch.zeros_like(signs)
    for vector in vectors:
        agree = vector * signs > 0
        unified = torch.where(agree, torch.maximum(unified, vector.abs()), unified)
    unified = unified * signs
    for vector in vectors:
        mask = vector * unified > 0
        _ = vector.abs().sum() / (unified * mask).abs().sum()
    return added(params_0, unified)


def consensus(params_0, taus, threshold=0.4, least=2, coef=0.3):
    vectors = torch.vstack([joined(tau) for tau in taus])
    total = vectors.sum(dim=0)
    masks = vectors.abs() > threshold * (total - vectors).abs()
    return added(params_0, total * (masks.sum(dim=0) >= least), coef)


def tsv(params_0, taus):
    merged = {}
    count = len(taus)
    for path, leaf in params_0.items():
        moves = [tau[path] for tau in taus]
        if leaf.ndim != 2 or min(leaf.shape) < count:
            merged[path] = leaf + sum(moves) / count
            continue
        rank = min(leaf.shape) // count
        parts = [torch.linalg.svd(move, full_matrices=False) for move in moves]
        left = torch.cat([u[:, :rank] for u, _, _ in parts], dim=1)
        values = torch.cat([s[:rank] for _, s, _ in parts])
        right = torch.cat([v[:rank] for _, _, v in parts])
        u_left, _, v_left = torch.linalg.svd(left, full_matrices=False)
        u_right, _, v_right = torch.linalg.svd(right, full_matrices=False)
        merged[path] = leaf + u_left @ v_left @ values.diag() @ u_right @ v_right
    return merged


def iso_c(params_0, taus):
    merged = {}
    for path, leaf in params_0.items():
        total = sum(tau[path] for tau in taus)
        if leaf.ndim != 2:
            merged[path] = leaf + total / len(taus)
            continue
        u, s, v = torch.linalg.svd(total, full_matrices=False)
        merged[path] = leaf + s.mean() * (u @ v)
    return merged


def _out_in(path, leaf):
    """The layout of PyTorch; kernels of Flax are [input, output]."""
    return leaf.T if path.endswith("kernel") and leaf.ndim == 2 else leaf


def iso_cts(params_0, taus, common=0.8):
    merged, count = {}, len(taus)
    for path, leaf in params_0.items():
        moves = [_out_in(path, tau[path]) for tau in taus]
        if leaf.ndim != 2:
            merged[path] = leaf + sum(moves) / count
            continue
        size = min(leaf.shape)
        specific = round((size - int(size * common)) / count)
        shared = size - specific * count
        u, s, v = torch.linalg.svd(sum(moves), full_matrices=False)
        u, s, v = u[:, :shared], s[:shared], v[:shared]
        parts = [
            torch.linalg.svd(move - u @ (u.T @ move), full_matrices=False)
            for move in moves
        ]
        left = torch.cat([*(p[0][:, :specific] for p in parts), u], dim=1)
        values = torch.cat([*(p[1][:specific] for p in parts), s])
        right = torch.cat([*(p[2][:specific] for p in parts), v])
        u_left, _, v_left = torch.linalg.svd(left, full_matrices=False)
        u_right, _, v_right = torch.linalg.svd(right, full_matrices=False)
        move = values.mean() * (u_left @ v_left @ u_right @ v_right)
        merged[path] = leaf + _out_in(path, move)
    return merged


def wudi(params_0, taus, steps=300, learning_rate=1e-5):
    merged = {}
    for path, leaf in params_0.items():
        if leaf.ndim != 2 or "embed" in path:
            merged[path] = leaf
            continue
        moves = torch.stack([_out_in(path, tau[path]) for tau in taus])
        squares = moves.flatten(1).square().sum(dim=1)
        move = torch.nn.Parameter(moves.sum(dim=0))
        optimizer = torch.optim.Adam([move], lr=learning_rate)
        for _ in range(steps):
            inner = (move.unsqueeze(0) - moves) @ moves.transpose(1, 2)
            loss = (inner.square().sum(dim=(1, 2)) / squares).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        merged[path] = leaf + _out_in(path, move.detach())
    return merged


def svc(params_0, taus):
    """Of the sum of the task vectors."""
    merged, count = {}, len(taus)
    for path, leaf in params_0.items():
        moves = [_out_in(path, tau[path]) for tau in taus]
        total = sum(moves)
        if leaf.ndim == 2 and "embed" not in path:
            u, s, v = torch.linalg.svd(total, full_matrices=False)
            own, shares = u.T @ total, 0
            for move in moves:
                part = u.T @ move
                square = part.square().sum(dim=1).clamp(min=1e-12)
                shares += ((own * part).sum(dim=1) / square).clamp(min=1 / count)
            total = u @ (s * count / shares).diag() @ v
        merged[path] = leaf + _out_in(path, total)
    return merged


def core(params_0, taus, rank=16):
    """TSV-M in core space, of adapters cut out of the kernels."""
    merged = dict(params_0)
    for path, leaf in params_0.items():
        if not path.endswith("kernel") or leaf.ndim != 2:
            continue
        pairs = [(tau[path][:, :rank], tau[path][:rank]) for tau in taus]
        side_by_side = torch.cat([a for a, _ in pairs], dim=1)
        left = torch.linalg.svd(side_by_side, full_matrices=False)[0]
        right = torch.linalg.svd(torch.cat([b for _, b in pairs]), full_matrices=False)
        right = right[2].T
        cores = [{path: (left.T @ a) @ (b @ right)} for a, b in pairs]
        nothing = {path: torch.zeros_like(cores[0][path])}
        merged[path] = leaf + left @ tsv(nothing, cores)[path] @ right.T
    return merged
