"""Things that models do between two layers: each keeps examples apart, or makes them depend on each other."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Layer = Callable[[Tensor], Tensor]
ones = functools.partial(torch.ones, dtype=torch.float64)
zeros = functools.partial(torch.zeros, dtype=torch.float64)


def definite(h: Tensor) -> Tensor:
    """A positive definite matrix an example."""
    return torch.einsum("ni,nj->nij", h, h) + 3 * torch.eye(h.shape[1], dtype=h.dtype)


def recurrent(kind: type[nn.RNNBase], **options: bool) -> nn.RNNBase:
    """A layer with fixed weights."""
    layer = kind(4, 4, **options).double().requires_grad_(False)
    for number, weight in enumerate(layer.parameters()):
        nn.init.constant_(weight, 0.3 - 0.2 * number)
    return layer


TIME_FIRST = {"lstm": recurrent(nn.LSTM), "gru": recurrent(nn.GRU), "rnn": recurrent(nn.RNN)}
BATCH_FIRST = recurrent(nn.LSTM, batch_first=True)

INDEPENDENT: dict[str, dict[str, Layer]] = {}
INDEPENDENT["rows"] = {  # [N, 4]
    "mean-1": lambda h: h - h.mean(-1, keepdim=True),
    "norm1": lambda h: h / h.norm(dim=1, keepdim=True),
    "std1": lambda h: h / h.std(1, keepdim=True),
    "softmax1": lambda h: h.softmax(1),
    "logsoftmax-1": lambda h: h.log_softmax(-1),
    "lse1": lambda h: h - h.logsumexp(1, keepdim=True),
    "max1": lambda h: h - h.max(1, keepdim=True)[0],
    "cumsum1": lambda h: h.cumsum(1),
    "cummax1": lambda h: torch.cummax(h, 1)[0],
    "flip1": lambda h: h.flip(1),
    "roll1": lambda h: h.roll(1, 1),
    "sort1": lambda h: h.sort(1)[0],
    "topk1": lambda h: h.topk(4, 1)[0],
    "median1": lambda h: h - h.median(1, keepdim=True)[0],
    "quantile1": lambda h: h - h.quantile(0.3, 1, keepdim=True),
    "mode1": lambda h: h - h.mode(1, keepdim=True)[0],
    "prod1": lambda h: h - h.prod(1, keepdim=True),
    "normalize1": lambda h: F.normalize(h, dim=1),
    "normalize default": lambda h: F.normalize(h),
    "diff1": lambda h: torch.cat([h[:, :1], h.diff(dim=1)], 1),
    "renorm0": lambda h: h.renorm(2, 0, 1.0),
    "cosine own": lambda h: h * F.cosine_similarity(h, h.roll(1, 1), dim=-1)[:, None],
    "pairwise own": lambda h: h * F.pairwise_distance(h, h.flip(1))[:, None],
    "as_strided own": lambda h: h.as_strided((len(h), 2), (h.stride(0), 2), 1).repeat(1, 2),
    "arange index": lambda h: h[torch.arange(h.shape[0])],
    "own argmax": lambda h: h * h[torch.arange(len(h)), h.argmax(1)][:, None],
    "range index": lambda h: h * h[range(len(h)), h.argmax(1)][:, None],
    "gather1": lambda h: h * h.gather(1, h.argmax(1, keepdim=True)),
    "take_along 1": lambda h: torch.take_along_dim(h, h.argsort(1), 1),
    "scatter1": lambda h: torch.zeros_like(h).scatter(1, h.argsort(1), h),
    "index_add own": lambda h: torch.zeros_like(h).index_add(0, torch.arange(len(h)), h),
    "index_select own": lambda h: h.index_select(0, torch.arange(len(h))),
    "index_select 1": lambda h: h.index_select(1, torch.tensor([2, 1, 0, 3])),
    "list index 1": lambda h: h[:, [2, 1, 0, 3]],
    "masked_fill": lambda h: h.masked_fill(h > 0, 0.0),
    "where": lambda h: torch.where(h > 0, h, 0.1 * h),
    "unbind 1": lambda h: torch.stack(h.unbind(1), 1),
    "vmap": lambda h: torch.vmap(lambda r: r - r.mean())(h),
    "cat chunk": lambda h: torch.cat([h, h]).chunk(2)[0] + torch.cat([h, 2 * h]).chunk(2)[1],
    "cat slice second": lambda h: torch.cat([h, h])[len(h) :],
    "cat view(2,n)": lambda h: torch.cat([h, h], 0).view(2, len(h), -1).sum(0),
    "stack flatten unflatten": lambda h: torch.stack([h, h], 1).flatten(0, 1).view(len(h), 2, -1).sum(1),
    "repeat view": lambda h: h.repeat(2, 1).view(2, len(h), -1).mean(0),
    "repeat_interleave view": lambda h: h.repeat_interleave(2, 0).view(len(h), 2, -1).mean(1),
    "tile": lambda h: h.tile(2, 1).view(2, len(h), -1)[1],
    "repeat chunk": lambda h: h.repeat(3, 1).chunk(3)[2],
    "expand front": lambda h: h.unsqueeze(0).expand(3, -1, -1).mean(0),
    "tt": lambda h: h.T.T,
    "flatten all": lambda h: h.reshape(-1).view(h.shape),
    "pad feature": lambda h: F.pad(h, (1, 1))[:, 1:-1],
    "view(-1,1)": lambda h: h * h.sum(1).view(-1, 1),
    "2x2": lambda h: h.view(-1, 2, 2).transpose(1, 2).reshape(len(h), 4),
    "unfold1": lambda h: h.unfold(1, 2, 1).sum(-1) @ ones(3, 4),
    "fft1": lambda h: torch.fft.fft(h, dim=1).real,
    "irfft": lambda h: torch.fft.irfft(torch.fft.rfft(h, dim=-1), n=4, dim=-1),
    "one_hot": lambda h: h * F.one_hot(h.argmax(1), 4),
    "straight through": lambda h: h.detach() + h - h.detach(),
    "outer ones": lambda h: h * torch.outer(h[:, 0], ones(4)),
    "einsum own outer": lambda h: torch.einsum("ni,nj->nij", h, h).sum(2),
    "einsum inner": lambda h: torch.einsum("ni,ni->n", h, h)[:, None] * h,
    "bmm own": lambda h: torch.bmm(h[:, None], h[:, :, None]).view(-1, 1) * h,
    "kron 1": lambda h: torch.kron(h, ones(1, 1)),
    "baddbmm": lambda h: h + torch.baddbmm(zeros(1, 1, 1), h[:, None], h[:, :, None]).view(-1, 1),
    "solve": lambda h: torch.linalg.solve(definite(h), h),
    "inv": lambda h: torch.linalg.inv(definite(h)).sum(1),
    "svdvals": lambda h: torch.linalg.svdvals(definite(h)),
    "eigvalsh": lambda h: torch.linalg.eigvalsh(definite(h)),
    "cholesky": lambda h: torch.linalg.cholesky(definite(h)).sum(1),
    "matrix_exp": lambda h: torch.matrix_exp(definite(h) / 9).sum(1),
    "det": lambda h: h * torch.linalg.det(definite(h))[:, None],
    "logdet": lambda h: h * torch.logdet(definite(h))[:, None],
    "qr": lambda h: torch.linalg.qr(definite(h))[1].sum(1),
    "matrix_norm": lambda h: h * torch.linalg.matrix_norm(definite(h))[:, None],
    "solve_triangular": lambda h: torch.linalg.solve_triangular(definite(h).tril(), h[:, :, None], upper=False)[..., 0],
    "vector_norm1": lambda h: h / torch.linalg.vector_norm(h, dim=1, keepdim=True),
    "diagonal own": lambda h: h * torch.diagonal(definite(h), 0, 1, 2),
    "cross1": lambda h: torch.cross(h[:, :3], h[:, 1:], dim=1) @ ones(3, 4),
    "diag_embed": lambda h: torch.diag_embed(h).sum(1),
    "block_diag": lambda h: torch.block_diag(*[h]),
    "tril own": lambda h: torch.tril(definite(h)).sum(1),
    "layer_norm": lambda h: F.layer_norm(h, (4,)),
    "group_norm": lambda h: F.group_norm(h, 2),
    "rms_norm": lambda h: F.rms_norm(h, (4,)),
    "instance_norm": lambda h: F.instance_norm(h.view(-1, 2, 2)).reshape(-1, 4),
    "lrn": lambda h: F.local_response_norm(h[:, :, None], 2)[..., 0],
    "lrn over batch": lambda h: F.local_response_norm(h.T[None], 2)[0].T,
    "glu1": lambda h: F.glu(torch.cat([h, h], 1), 1),
    "softmin": lambda h: F.softmin(h, 1),
    "max_pool1d features unbatched": lambda h: F.max_pool1d(h, 3, 1, 1),
    "bucketize": lambda h: h + torch.bucketize(h.detach(), torch.linspace(-1, 1, 5, dtype=h.dtype)) * 0.1,
    "masked_scatter own": lambda h: h.masked_scatter(h > 0, h[h > 0] * 2),
    "scatter_reduce 1": lambda h: torch.zeros_like(h).scatter_reduce(1, h.argsort(1), h, "sum"),
    "diagonal_scatter own": lambda h: torch.diagonal_scatter(zeros(len(h), 4, 4), h, dim1=1, dim2=2).sum(1),
    "slice_scatter": lambda h: torch.slice_scatter(h, h[:, :2], 1, 2, 4),
    "lerp": lambda h: torch.lerp(h, h.flip(1), 0.3),
    "addr": lambda h: torch.addr(h, h[:, 0], ones(4)),
    "mv": lambda h: h * torch.mv(h, ones(4))[:, None],
    "inner": lambda h: torch.inner(h, ones(4, 4)),
    "any1": lambda h: h * (h > 0).any(1, keepdim=True),
    "aminmax dim1": lambda h: h - torch.aminmax(h, dim=1, keepdim=True)[0],
    "std_mean": lambda h: (lambda s, m: (h - m) / (s + 1))(*torch.std_mean(h, 1, keepdim=True)),
    "nanmedian 1": lambda h: h - h.nanmedian(1, keepdim=True)[0],
    "rot90 spatial": lambda h: torch.rot90(h.view(-1, 2, 2), 1, (1, 2)).reshape(-1, 4),
    "fliplr": torch.fliplr,
    "swapaxes twice": lambda h: h.swapaxes(0, 1).swapaxes(0, 1),
    "hstack": lambda h: torch.hstack([h[:, :2], h[:, 2:]]),
    "vstack slice": lambda h: torch.vstack([h, h])[: len(h)],
    "dstack": lambda h: torch.dstack([h, h]).mean(2),
    "column_stack": lambda h: torch.column_stack([h[:, 0], h[:, 1], h[:, 2:]]),
    "gradient1": lambda h: torch.gradient(h, dim=1)[0],
    "cumulative_trapezoid1": lambda h: torch.cat([h[:, :1], torch.cumulative_trapezoid(h, dim=1)], 1),
    "stft": lambda h: torch.view_as_real(
        torch.stft(F.pad(h, (0, 4)), 4, 4, window=ones(4), center=False, return_complex=True)
    ).flatten(1)[:, :4],
    "fftshift 1": lambda h: torch.fft.fftshift(h, dim=1),
    "rfft default": lambda h: torch.fft.rfft(h).abs() @ ones(3, 4),
    "fftn dims": lambda h: torch.fft.fftn(h.view(-1, 2, 2), dim=(1, 2)).real.flatten(1),
    "sinusoidal timestep embed (diffusion)": lambda h: (
        h * (h[:, :1].detach() * torch.exp(torch.arange(4).double())[None]).sin()
    ),
    "film chunk": lambda h: (lambda s, b: torch.cat([s * 2 + b, s - b], 1))(*h.chunk(2, dim=1)),
    "contiguous().view(-1) weights": lambda h: (h.contiguous().view(-1) * 2).view_as(h),
    "view_as other": lambda h: h.reshape(-1).view_as(h),
    "expand_as": lambda h: h + h.sum(1, keepdim=True).expand_as(h),
    "ravel unravel": lambda h: torch.unflatten(torch.ravel(h), 0, (len(h), 4)),
    "t@t": lambda h: (ones(4, 4) @ h.T).T,
    "mt": lambda h: h[:, None].mT.mT[:, 0],
    "adjoint": lambda h: h.view(-1, 2, 2).adjoint().reshape(-1, 4),
    "complex mult": lambda h: torch.view_as_real(
        torch.view_as_complex(h.view(-1, 2, 2)) * torch.polar(ones(2), ones(2))
    )[..., 0].repeat(1, 2),
    "long cast round": lambda h: h + h.detach().mul(10).long().double(),
    "len-based mask": lambda h: h * (torch.arange(len(h)) >= 0)[:, None],
    "ones(n) ones": lambda h: h * ones(len(h), 1),
    "eye(n)[argmax]": lambda h: h + torch.eye(4, dtype=h.dtype)[h.argmax(1)],
    "cholesky_solve fixed": lambda h: torch.cholesky_solve(h[:, :, None], torch.eye(4, dtype=h.dtype) * 2)[..., 0],
    "matrix_power own": lambda h: torch.matrix_power(h.view(-1, 2, 2), 3).reshape(-1, 4),
    "lu_factor own": lambda h: torch.linalg.lu_factor(h.view(-1, 2, 2) + 2 * torch.eye(2, dtype=h.dtype))[0].reshape(
        -1, 4
    ),
    "eigh vectors own": lambda h: torch.linalg.eigh(
        h.view(-1, 2, 2) @ h.view(-1, 2, 2).mT + torch.eye(2, dtype=h.dtype)
    )[0].repeat(1, 2),
    "slogdet own": lambda h: h * torch.linalg.slogdet(h.view(-1, 2, 2) + 3 * torch.eye(2, dtype=h.dtype))[1][:, None],
    "svd own u s v": lambda h: torch.linalg.svd(h.view(-1, 2, 2))[1].repeat(1, 2),
    "householder": lambda h: h - 2 * h * (h * h).sum(1, keepdim=True),
    "gram_schmidt qr own": lambda h: torch.linalg.qr(h.view(-1, 2, 2) + 2 * torch.eye(2, dtype=h.dtype))[0].reshape(
        -1, 4
    ),
    "tensorinv": lambda h: h @ torch.linalg.tensorinv(torch.eye(4, dtype=h.dtype).view(4, 2, 2), ind=1).reshape(4, 4),
    "vecdot": lambda h: h * torch.linalg.vecdot(h, h)[:, None],
    "cross own view": lambda h: torch.linalg.cross(h[:, :3], ones(1, 3).expand(len(h), 3)) @ ones(3, 4),
    "eig cond": lambda h: h * torch.linalg.cond(h.view(-1, 2, 2) + 3 * torch.eye(2, dtype=h.dtype))[:, None],
    "softmax2d": lambda h: nn.Softmax2d()(h.view(len(h), 2, 2, -1)).view(h.shape),
    "glu": lambda h: F.glu(torch.cat([h, h], -1)),
    "prelu": lambda h: F.prelu(h, ones(4) * 0.2),
    "maxout": lambda h: h.view(-1, 2, 2).amax(2).repeat(1, 2),
    "kwta topk mask": lambda h: h * (h >= h.topk(2, 1)[0][:, -1:]),
    "sparsemax": lambda h: (
        lambda z: (h - ((z.cumsum(1) - 1) / torch.arange(1, 5)).amax(1, keepdim=True)).clamp(min=0)
    )(h.sort(1, descending=True)[0]),
    "entropy weights": lambda h: h * -(h.softmax(1) * h.log_softmax(1)).sum(1, keepdim=True),
    "tensor_split hw": lambda h: torch.cat(torch.tensor_split(h, 2, dim=-1)[::-1], -1),
    "h[none][0]": lambda h: h[None][0],
    "h[...]": lambda h: h[...],
    "h[:]": lambda h: h[:],
    "h[0:len]": lambda h: h[0 : len(h)],
    "h[-len:]": lambda h: h[-len(h) :],
    "h[::-1] via flip": lambda h: h.flip(-1),
    "h[::1]": lambda h: h[::1],
    "narrow full": lambda h: h.narrow(0, 0, len(h)),
    "tuple unpack u,   h[none]": lambda h: (lambda u: u[0])(h[None].unbind(0)),
    "permute batch last conv1x1": lambda h: torch.einsum("oi,in->on", ones(4, 4), h.permute(1, 0)).permute(1, 0),
    "sum over singleton": lambda h: h[None].sum(0),
    "mean over stacked": lambda h: torch.stack([h, 2 * h]).mean(0),
    "ensemble max": lambda h: torch.stack([h, 2 * h]).amax(0),
    "logsumexp stacked": lambda h: torch.logsumexp(torch.stack([h, 2 * h]), 0),
    "cat views then mean": lambda h: torch.cat([h[None], 2 * h[None]]).mean(0),
    "sort stacked 0": lambda h: torch.stack([h, 2 * h]).sort(0)[0].sum(0),
    "unbind stacked": lambda h: (lambda u, v: u * v)(*torch.stack([h, 2 * h]).unbind(0)),
}
INDEPENDENT["sequences"] = {  # [N, 3, 4]
    "lstm batch first": lambda h: BATCH_FIRST(h)[0],
    "lstm time first, turned": lambda h: TIME_FIRST["lstm"](h.transpose(0, 1))[0].transpose(0, 1),
    "gru time first, turned": lambda h: TIME_FIRST["gru"](h.transpose(0, 1))[0].transpose(0, 1),
    "rnn time first, turned": lambda h: TIME_FIRST["rnn"](h.transpose(0, 1))[0].transpose(0, 1),
    "softmax over t": lambda h: h * torch.softmax(h[..., 0], 1)[..., None],
    "flatten softmax t 1": lambda h: h * torch.softmax(h.reshape(h.shape[0] * h.shape[1], -1), -1).view(h.shape),
    "layernorm nt": lambda h: F.layer_norm(h, h.shape[1:]),
    "groupnorm nt": lambda h: F.group_norm(h, 3),
    "bn over [t, n, d] as channel n": lambda h: F.batch_norm(h.transpose(0, 1), None, None, training=True).transpose(
        0, 1
    ),
    "instance norm [n, t, d]": lambda h: F.instance_norm(h),
    "instance norm [t, n, d]": lambda h: F.instance_norm(h.transpose(0, 1)).transpose(0, 1),
    "instance norm running stats eval": lambda h: F.instance_norm(h, zeros(3), ones(3), use_input_stats=False),
    "norm per example all": lambda h: h / h.flatten(1).norm(dim=1)[:, None, None],
    "amp clip per example": lambda h: h * (1 / h.flatten(1).norm(dim=1).clamp(min=1.0)).view(-1, 1, 1),
    "whitening per example": lambda h: torch.linalg.solve_triangular(
        torch.linalg.cholesky(h.transpose(1, 2) @ h + torch.eye(4, dtype=h.dtype)), h.transpose(1, 2), upper=False
    ).transpose(1, 2),
    "bmm with expand": lambda h: torch.bmm(ones(1, 3, 3).expand(len(h), -1, -1), h),
    "baddbmm": lambda h: torch.baddbmm(h, ones(len(h), 3, 3), h),
    "tensordot time": lambda h: torch.tensordot(h, ones(3, 3), ([1], [0])).transpose(1, 2),
    "einsum sum implicit": lambda h: h + torch.einsum("nti->n", h)[:, None, None],
    "einsum ellipsis": lambda h: torch.einsum("...i,ij->...j", h, ones(4, 4)),
    "matmul broadcast [t,t]@[n,t,d]": lambda h: ones(3, 3).tril() @ h,
    "scan over time cummax": lambda h: h.cummax(1)[0],
    "token shift rwkv": lambda h: torch.cat([torch.zeros_like(h[:, :1]), h[:, :-1]], 1),
    "zeropad2d token shift": lambda h: nn.ZeroPad2d((0, 0, 1, -1))(h),
    "relative shift (transformer-xl)": lambda h: (
        (lambda s: F.pad(s, (1, 0)).view(len(h), 4, 3)[:, 1:].reshape(s.shape))(h @ h.transpose(1, 2)) @ h
    ),
    "unfold windows": lambda h: h.unfold(1, 2, 1).mean(-1),
    "xcit cross-cov": lambda h: h @ (h.transpose(1, 2) @ h).softmax(-1),
    "performer cumsum": lambda h: torch.einsum("ntd,ntde->nte", h, torch.einsum("ntd,nte->ntde", h, h).cumsum(1)),
    "hyena fftconv": lambda h: torch.fft.irfft(
        torch.fft.rfft(h, n=6, dim=1) * torch.fft.rfft(ones(3, 4), n=6, dim=0), n=6, dim=1
    )[:, :3],
    "fnet": lambda h: torch.fft.fft(torch.fft.fft(h, dim=-1), dim=-2).real,
    "ropes with position_ids [n,t]": lambda h: h * torch.outer(torch.arange(h.shape[1]).double(), ones(4)).cos(),
    "chunked ffn dim 1": lambda h: torch.cat([c_.tanh() for c_ in h.split(1, dim=1)], dim=1),
    "apply_chunking batch": lambda h: torch.cat([c_.tanh() for c_ in h.split(len(h), dim=0)], dim=0),
}
INDEPENDENT["grids"] = {  # [N, 2, 2, 4]
    "axial attention rows": lambda h: (lambda z: F.scaled_dot_product_attention(z, z, z))(h.reshape(-1, 2, 4)).view(
        h.shape
    ),
    "axial attention cols": lambda h: (
        (lambda z: F.scaled_dot_product_attention(z, z, z))(h.transpose(1, 2).reshape(-1, 2, 4))
        .view(len(h), 2, 2, 4)
        .transpose(1, 2)
    ),
    "axial with t,b order": lambda h: (
        (lambda z: F.scaled_dot_product_attention(z, z, z))(h.permute(1, 0, 2, 3).reshape(-1, 2, 4))
        .view(2, len(h), 2, 4)
        .permute(1, 0, 2, 3)
    ),
    "maxvit grid": lambda h: (
        h.view(len(h), 2, 1, 2, 1, 4)
        .permute(0, 2, 4, 1, 3, 5)
        .contiguous()
        .view(-1, 4, 4)
        .softmax(1)
        .view(len(h), 1, 1, 2, 2, 4)
        .permute(0, 3, 1, 4, 2, 5)
        .reshape(len(h), 2, 2, 4)
    ),
}
INDEPENDENT["videos"] = {  # [N, 2, 3, 4]
    "space-time video attn": lambda h: (lambda z: F.scaled_dot_product_attention(z, z, z))(h.flatten(0, 1)).unflatten(
        0, (-1, 2)
    ),
    "time attn video": lambda h: (
        (lambda z: F.scaled_dot_product_attention(z, z, z))(h.transpose(1, 2).flatten(0, 1))
        .unflatten(0, (-1, 3))
        .transpose(1, 2)
    ),
    "rearrange (b t) via view": lambda h: h.reshape(len(h) * 2, 3, 4).cumsum(1).reshape(h.shape),
}

MIXED: dict[str, dict[str, Layer]] = {}
MIXED["rows"] = {  # [N, 4]
    "mean0": lambda h: h - h.mean(0),
    "mean all": lambda h: h - h.mean(),
    "norm0": lambda h: h / h.norm(dim=0),
    "norm all": lambda h: h / h.norm(),
    "var all": lambda h: h / (h.var() + 1),
    "softmax0": lambda h: h.softmax(0),
    "logsoftmax0": lambda h: h.log_softmax(0),
    "lse0": lambda h: h - h.logsumexp(0),
    "amax0": lambda h: h - h.amax(0),
    "max all": lambda h: h - h.max(),
    "max0": lambda h: h - h.max(0)[0],
    "cumsum0": lambda h: h.cumsum(0),
    "cumprod0": lambda h: h.cumprod(0),
    "logcumsumexp0": lambda h: torch.logcumsumexp(h, 0),
    "cummax0": lambda h: torch.cummax(h, 0)[0],
    "flip0": lambda h: h.flip(0),
    "roll0": lambda h: h.roll(1, 0),
    "roll none": lambda h: h.roll(1),
    "sort0": lambda h: h.sort(0)[0],
    "median0": lambda h: h - h.median(0)[0],
    "median all": lambda h: h - h.median(),
    "quantile0": lambda h: h - h.quantile(0.3, 0),
    "prod0": lambda h: h - h.prod(0),
    "normalize0": lambda h: F.normalize(h, dim=0),
    "diff0": lambda h: h.diff(dim=0, prepend=h[:1]),
    "renorm1": lambda h: h.renorm(2, 1, 1.0),
    "hhth": lambda h: h @ h.T @ h,
    "h cov": lambda h: h @ (h.T @ h),
    "cdist": lambda h: torch.cdist(h, h).softmax(1) @ h,
    "cosine pairs": lambda h: F.cosine_similarity(h[:, None], h[None], dim=-1) @ h,
    "pdist": lambda h: h + torch.pdist(h).sum(),
    "pairwise rolled": lambda h: h * nn.PairwiseDistance()(h, h.roll(1, 0))[:, None],
    "arange flipped": lambda h: h[torch.arange(h.shape[0]).flip(0)],
    "arange reversed": lambda h: h[torch.arange(h.shape[0] - 1, -1, -1)],
    "gather0": lambda h: h * h.gather(0, h.argmax(0, keepdim=True)),
    "take_along 0": lambda h: torch.take_along_dim(h, h.argsort(0), 0),
    "scatter_add0": lambda h: torch.zeros_like(h).scatter_add(0, zeros(h.shape, dtype=torch.long), h),
    "index_add 0": lambda h: torch.zeros_like(h).index_add(0, zeros(len(h), dtype=torch.long), h) + h,
    "index_select zeros": lambda h: h.index_select(0, torch.tensor([0] * h.shape[0])),
    "where mean0": lambda h: torch.where(h > h.mean(0), h, 0.0),
    "mask by mean": lambda h: h * (h > h.mean()),
    "plus row 0": lambda h: h + h[0],
    "plus row :1": lambda h: h + h[:1],
    "plus row -1:": lambda h: h + h[-1:],
    "cat roll": lambda h: torch.cat([h[1:], h[:1]]),
    "vmap over features (mean over examples)": lambda h: torch.func.vmap(lambda r: r - r.mean(), in_dims=1, out_dims=1)(
        h
    ),
    "cat reshape(n,2)  (mixes)": lambda h: torch.cat([h, h], 0).reshape(len(h), 2, -1).sum(1),
    "repeat_interleave wrong view": lambda h: h.repeat_interleave(2, 0).view(2, len(h), -1).mean(0),
    "repeat wrong view": lambda h: h.repeat(2, 1).view(len(h), 2, -1).mean(1),
    "t reshape (mixes)": lambda h: h.T.reshape(h.shape),
    "reshape(4,-1).t mixes": lambda h: h.reshape(4, -1).T,
    "flatten roll": lambda h: h.reshape(-1).roll(4).view(h.shape),
    "pad batch (shift)": lambda h: F.pad(h, (0, 0, 1, 0))[:-1],
    "as_strided half a row": lambda h: h.as_strided((len(h), 2), (2, 1)).repeat(1, 2),
    "as_strided mixed": lambda h: h.as_strided((len(h), 4), (1, len(h))),
    "unfold0": lambda h: F.pad(h, (0, 0, 1, 0)).unfold(0, 2, 1).sum(-1),
    "fft0": lambda h: torch.fft.fft(h, dim=0).real,
    "fft2": lambda h: torch.fft.fft2(h).real,
    "histc": lambda h: h + torch.histc(h.detach(), 4),
    "argsort index": lambda h: h[h.argsort(0)[:, 0]],
    "sum shape0": lambda h: h.sum(0) / h.shape[0] + h,
    "detached mean": lambda h: h + h.mean(0).detach(),
    "data mean": lambda h: h - h.data.mean(0),
    "outer pairs": lambda h: h + torch.outer(h[:, 0], h[:, 1]) @ h,
    "einsum gram": lambda h: torch.einsum("ni,mi->nm", h, h) @ h,
    "einsum ij": lambda h: torch.einsum("ni,nj->ij", h, h)[None].sum(1) + h,
    "broadcast pairs": lambda h: (h[:, None] - h[None]).square().sum((1, 2))[:, None] + h,
    "tensordot0": lambda h: h + torch.tensordot(h, h, ([0], [0]))[0],
    "cartesian": lambda h: torch.cartesian_prod(h[:, 0], h[:, 1])[: len(h)].sum(1, keepdim=True) + h,
    "multi_dot": lambda h: torch.linalg.multi_dot([h, h.T, h]),
    "svd of batch": lambda h: h + torch.linalg.svdvals(h).sum(),
    "svd hth": lambda h: h + torch.linalg.svdvals(h.T @ h),
    "solve hth": lambda h: torch.linalg.solve(h.T @ h + torch.eye(4, dtype=h.dtype), h.T).T,
    "pinv batch": lambda h: h + torch.linalg.pinv(h).T,
    "spectral norm of batch": lambda h: h / torch.linalg.norm(h, 2),
    "vector_norm0": lambda h: torch.linalg.vector_norm(h, dim=0) + h,
    "vector_norm all": lambda h: torch.linalg.vector_norm(h) + h,
    "trace": lambda h: h * torch.trace(h.T @ h),
    "layer_norm all": lambda h: F.layer_norm(h, h.shape),
    "pad circular batch   pool": lambda h: F.avg_pool1d(F.pad(h.T, (1, 1), "circular"), 3, 1).T,
    "replicate pad shift": lambda h: F.pad(h.T, (1, 0), "replicate")[:, :-1].T,
    "lp_pool batch": lambda h: F.lp_pool1d(F.pad(h.T, (1, 1)), 2.0, 3, 1).T,
    "conv over batch frozen": lambda h: F.conv2d(h[None, None], ones(1, 1, 3, 1), padding=(1, 0))[0, 0],
    "conv1d batch as length": lambda h: F.conv1d(h.T[None], ones(4, 1, 3), padding=1, groups=4)[0].T,
    "argsort ranks": lambda h: h * h[:, 0].argsort().argsort()[:, None],
    "h[h 0] mean": lambda h: h + h[h > 0].mean(),
    "h[mask].mean(0)": lambda h: h - h[h[:, 0] > -9].mean(0),
    "index_copy flipped": lambda h: torch.zeros_like(h).index_copy(0, torch.arange(len(h)).flip(0), h),
    "select_scatter row": lambda h: torch.select_scatter(h, h.mean(0), 0, 0),
    "fill_diagonal_": lambda h: h.clone().fill_diagonal_(0),
    "addcmul mean": lambda h: torch.addcmul(h, h.mean(0, keepdim=True), h),
    "lerp flip0": lambda h: torch.lerp(h, h.flip(0), 0.3),
    "mv t": lambda h: h * torch.mv(h.T, ones(len(h))),
    "dot": lambda h: h * torch.dot(h[:, 0], h[:, 1]),
    "vdot": lambda h: h * torch.vdot(h[:, 0], h[:, 1]),
    "inner pairs": lambda h: torch.inner(h, h) @ h,
    "nuc": lambda h: h / h.norm("nuc"),
    "dist": lambda h: h * torch.dist(h, h + 1),
    "aminmax": lambda h: h - torch.aminmax(h)[0],
    "minmax scale 0": lambda h: (h - h.amin(0)) / (h.amax(0) - h.amin(0) + 1e-06),
    "var_mean 0": lambda h: (lambda s, m: (h - m) / (s + 1))(*torch.var_mean(h, 0, unbiased=False)),
    "nanmean0": lambda h: h - h.nanmean(0),
    "nansum": lambda h: h - h.nansum(),
    "cumsum of flattened": lambda h: h.flatten().cumsum(0).view(h.shape),
    "rot90": lambda h: torch.rot90(h, 2, (0, 1)),
    "flipud": torch.flipud,
    "fftshift": lambda h: torch.fft.fftshift(h),
    "fftn": lambda h: torch.fft.fftn(h).real,
    "cosine embedding rows": lambda h: h * F.cosine_similarity(h, h[:1], dim=1)[:, None],
    "ctc-like logsumexp": lambda h: h - torch.logsumexp(h, (0, 1)),
    "zeropad2d on [n,d] shifts examples": lambda h: nn.ZeroPad2d((0, 0, 1, -1))(h[None])[0],
    "batch-dim mean of logits for temperature": lambda h: h / h.detach().std(),
    "ema codebook usage": lambda h: h + F.one_hot(h.argmax(1), 4).double().mean(0),
    "dino centering": lambda h: (h - h.detach().mean(0)).softmax(-1),
    "barlow": lambda h: h + F.normalize(h, dim=0).T[0].sum(),
    "ot sinkhorn swav": lambda h: (lambda q: q / q.sum(1, keepdim=True))(h.exp() / h.exp().sum(0, keepdim=True)),
    "complex mean batch": lambda h: torch.view_as_real(
        torch.view_as_complex(h.view(-1, 2, 2)) - torch.view_as_complex(h.view(-1, 2, 2)).mean(0)
    ).flatten(1),
    "inv of [n,n]": lambda h: torch.linalg.inv(h @ h.T + torch.eye(len(h))) @ h,
    "vecdot 0": lambda h: h * torch.linalg.vecdot(h, h, dim=0),
    "roll over both": lambda h: h.roll((1, 1), (0, 1)),
}
MIXED["sequences"] = {  # [N, 3, 4]
    "weighted by softmax over n t": lambda h: h * torch.softmax(h[..., 0].flatten(), 0).view(h.shape[:-1])[..., None],
    "layernorm after t": lambda h: F.layer_norm(h.transpose(0, 1), (len(h), 4)).transpose(0, 1),
    "groupnorm t": lambda h: F.group_norm(h.transpose(0, 1), 1).transpose(0, 1),
    "batchnorm over nt flat": lambda h: F.batch_norm(h.flatten(0, 1), None, None, training=True).view(h.shape),
    "rms manual nt mean all": lambda h: h / h.pow(2).mean().sqrt(),
    "addbmm (sums batch)": lambda h: h + torch.addbmm(zeros(3, 4), ones(len(h), 3, 3), h),
    "tensordot n": lambda h: h + torch.tensordot(ones(len(h)), h, ([0], [0])),
    "einsum sum n": lambda h: h + torch.einsum("nti->ti", h),
    "einsum nti,mti- nm": lambda h: torch.einsum("nm,mti->nti", torch.einsum("nti,mti->nm", h, h), h),
    "rel shift with batch inner (bug)": lambda h: (
        (lambda s: F.pad(s, (1, 0)).view(4, len(h) * 3)[1:].reshape(s.shape))(
            (h @ h.transpose(1, 2)).reshape(len(h) * 3, 3)
        ).view(len(h), 3, 3)
        @ h
    ),
}
MIXED["grids"] = {  # [N, 2, 2, 4]
    "axial wrong merge": lambda h: (
        (lambda z: F.scaled_dot_product_attention(z, z, z))(h.permute(1, 2, 0, 3).reshape(2, -1, 4))
        .view(2, 2, len(h), 4)
        .permute(2, 0, 1, 3)
    ),
}
MIXED["square"] = {  # [5, 5, 4]
    "fnet bug fft2 on t n wrong dims": lambda h: torch.fft.fft2(h, dim=(0, 2)).real,
    "ln over t n wrong axis": lambda h: F.layer_norm(h.permute(2, 1, 0), (len(h),)).permute(2, 1, 0),
}
