"""A smooth estimate of the size of a JPEG file, so that a byte count can be a differentiable reward.

The transform equals the encoder's: RGB -> YCbCr (JFIF), chroma averaged over 2 x 2 pixels (4:2:0), 8 x 8 DCT, division
by the tables of ITU-T T.81 Annex K, scaled to `quality` as in libjpeg. The encoder then rounds to integers q, codes
each nonzero q by its bit length and the number of zeros before it, and ends the block after the last nonzero one. The
estimate replaces this, for the real-valued coefficients q_k, k = 1..63 in zigzag order, by

    p_k = u_k / (1 + u_k),  u_k = (q_k / 0.5)^4           soft "rounds to a nonzero value": 1/2 at |q| = 0.5
    e_k = 1 - prod_{j > k} (1 - p_j)                      soft "a nonzero value is still to come"
    bits = c_block * (number of blocks)                   end-of-block code and the shortest DC code
         + c_nonzero * sum p_k                            sign, and the least bits of the run/length code
         + c_zero * sum (1 - p_k) e_k                     zeros inside a run; those after the last nonzero are free
         + c_length * sum log2(1 + q_k^2) / 2             bit length, of the value and inside the code
         + c_dc * sum log2(1 + d^2) / 2                   bit length of d, difference of neighbouring DC coefficients

and the score is (623 bytes of headers and tables + bits / 8) / 1000. The five constants are a least-squares fit
(relative error) to Pillow's byte counts of about 800 pictures at quality 95, each at 64, 256 and 512 pixels if it is
large enough; `jpeg_calibration.py` repeats the fit. On other pictures the relative error is 1 to 5 % (root mean square,
by kind of picture). The estimate also follows the true count when pixels are optimised for it.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alignprop_fast.rewards.preprocess import without_autocast

# ITU-T T.81, tables K.1 and K.2, row by row. All entries outside the chroma table's upper left corner are 99.
_LUMA_TABLE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMA_CORNER = ((17, 18, 24, 47), (18, 21, 26, 66), (24, 26, 56, 99), (47, 66, 99, 99))
# JFIF 1.02: rows are Y, Cb, Cr. Y is centred by subtracting 128; the chroma planes are centred already.
_RGB_TO_YCBCR = ((0.299, 0.587, 0.114), (-0.168735892, -0.331264108, 0.5), (0.5, -0.418687589, -0.081312411))

_HEADER_BYTES = 623.0  # Pillow's markers, quantisation tables and standard Huffman tables
_BITS_PER_FEATURE = (5.36, 1.17, 1.31, 2.28, 1.94)  # c_block, c_nonzero, c_zero, c_length, c_dc
_ZERO_BELOW = 0.5  # in quantisation steps


class JpegSize(nn.Module):
    """Estimated size in kB (1000 bytes) of each image as a 4:2:0 baseline JPEG file. Smooth in the pixels."""

    rgb_to_ycbcr: Tensor
    bits_per_feature: Tensor
    luma_dct: Tensor
    chroma_dct: Tensor

    def __init__(self, quality: int = 95) -> None:
        """quality: 1..100, on libjpeg's scale. The constants were fitted at 95, DDPO's setting."""
        super().__init__()
        if not 1 <= quality <= 100:
            raise ValueError(f"JPEG quality must be between 1 and 100, not {quality}")
        chroma_table = torch.full((8, 8), 99.0)
        chroma_table[:4, :4] = torch.tensor(_CHROMA_CORNER)
        self.register_buffer("rgb_to_ycbcr", torch.tensor(_RGB_TO_YCBCR), persistent=False)
        self.register_buffer("bits_per_feature", torch.tensor(_BITS_PER_FEATURE), persistent=False)
        self.register_buffer("luma_dct", _dct_basis(torch.tensor(_LUMA_TABLE), quality), persistent=False)
        self.register_buffer("chroma_dct", _dct_basis(chroma_table, quality), persistent=False)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """images_BCHW: [B, 3, H, W] in [0, 1], any size, any float dtype (fp32 or wider inside). Returns kB, [B]."""
        bits_B = (self.features(images_BCHW) * self.bits_per_feature).sum(-1)
        return (_HEADER_BYTES + bits_B / 8) / 1000

    def features(self, images_BCHW: Tensor) -> Tensor:
        """The five sums of the module's formula, [B, 5]; the estimate is linear in them."""
        images_BCHW = images_BCHW.to(torch.promote_types(images_BCHW.dtype, torch.float32))
        # Autocast would run the products below in half precision, which cannot tell small coefficients from zero.
        with without_autocast(images_BCHW):
            luma_B1HW, chroma_B2HW = self._planes(images_BCHW)
            luma_BCNK = _blocks(luma_B1HW, macro=2) @ self.luma_dct.to(images_BCHW.dtype)
            chroma_BCNK = _blocks(chroma_B2HW, macro=1) @ self.chroma_dct.to(images_BCHW.dtype)
            return torch.cat([_plane_features(luma_BCNK), _plane_features(chroma_BCNK)], dim=1).sum(1)

    def _planes(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Y and half-size CbCr on the 8-bit scale, centred, the border repeated up to whole 16 x 16 units."""
        height, width = images_BCHW.shape[-2:]
        padded_BCHW = F.pad(images_BCHW, (0, -width % 16, 0, -height % 16), mode="replicate")
        matrix = self.rgb_to_ycbcr.to(images_BCHW.dtype) * 255
        ycbcr_BCHW = torch.einsum("yc,bchw->byhw", matrix, padded_BCHW)
        return ycbcr_BCHW[:, :1] - 128, F.avg_pool2d(ycbcr_BCHW[:, 1:], 2)


def _dct_basis(table: Tensor, quality: int) -> Tensor:
    """[64 pixels, 64 coefficients in zigzag order]: 8 x 8 DCT-II and the division by the scaled table in one matrix."""
    scale = 5000 / quality if quality < 50 else 200 - 2 * quality
    steps = torch.floor((table * math.floor(scale) + 50) / 100).clamp(1, 255).double()
    x = torch.arange(8, dtype=torch.float64)
    dct = torch.cos((2 * x + 1) * x[:, None] * math.pi / 16) / 2
    dct[0] /= math.sqrt(2)
    basis_PK = torch.einsum("uy,vx->yxuv", dct, dct).reshape(64, 64) / steps.reshape(64)
    # Zigzag: by anti-diagonals; even ones run up to the right, odd ones down to the left.
    order = sorted(range(64), key=lambda n: (n // 8 + n % 8, n // 8 if (n // 8 + n % 8) % 2 else n % 8))
    return basis_PK[:, order].float()


def _blocks(planes_BCHW: Tensor, macro: int) -> Tensor:
    """Planes split into 8 x 8 blocks, [B, C, N, 64], in the encoder's order: units of macro x macro, row by row."""
    batch, channels, height, width = planes_BCHW.shape
    unit = 8 * macro
    split = planes_BCHW.reshape(batch, channels, height // unit, macro, 8, width // unit, macro, 8)
    return split.permute(0, 1, 2, 5, 3, 6, 4, 7).reshape(batch, channels, -1, 64)


def _plane_features(q_BCNK: Tensor) -> Tensor:
    """The sums of the module's formula for each plane, [B, C, 5], from coefficients in quantisation steps."""
    ac, dc = q_BCNK[..., 1:], q_BCNK[..., 0]
    differences = torch.diff(dc, dim=-1, prepend=torch.zeros_like(dc[..., :1]))
    u = (ac / _ZERO_BELOW) ** 4
    nonzero = u / (1 + u)
    log_zero = -torch.log1p(u)  # log(1 - p)
    log_all_zero = log_zero.cumsum(-1)
    to_come = -torch.expm1(log_all_zero[..., -1:] - log_all_zero)
    sums = (
        torch.full_like(dc[..., 0], dc.shape[-1]),
        nonzero.sum((-2, -1)),
        ((1 - nonzero) * to_come).sum((-2, -1)),
        _bit_length(ac).sum((-2, -1)),
        _bit_length(differences).sum(-1),
    )
    return torch.stack(sums, -1)


def _bit_length(q: Tensor) -> Tensor:
    """log2 |q|, smoothed so that it is zero at zero."""
    return torch.log1p(q * q) * (0.5 / math.log(2))
