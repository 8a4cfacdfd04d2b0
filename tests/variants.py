"""The first experiments of a paper that starts from this code: the six scripts are not edited.

    python tests/variants.py --data-dir DIR --folder RESULTS [--only qat strided rate hnd] [...]

By hand, with the flags and the folder of outcome.py: teacher and plain students are taken from there,
or made. Each experiment is a function that returns what train.run_experiment is given: another
bottleneck, another loss, or both. Students are evaluated after the last epoch.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import outcome
import torch
from outcome import Row, Study
from scipy.stats import ttest_rel
from torch import Tensor, nn

import distributed
import losses
import models
import train

LAMBDAS = (0.3, 1.0, 3.0)  # squared error that one bit is worth
RATE_BITS = 4
GHND_LONGER, HND_LONGER = "GHND, trained longer", "HND, trained longer"

# ---- the experiments -----------------------------------------------------------------------------


def quantized(bits: int, first_batch: int = 0) -> type[models.Bottleneck]:
    """Return a Bottleneck that trains with what will be sent; gradients pass straight through.

    first_batch: until then it trains as usual. Its BatchNorm layers count the batches.
    """

    class Quantized(models.Bottleneck):
        def forward(self, x: Tensor) -> Tensor:
            z = self.encoder(x)
            if self.training and self.decoder[0].num_batches_tracked < first_batch:
                return self.decoder(z)
            sent = torch.stack([models.dequantize(*models.quantize(image, bits)) for image in z])
            return self.decoder(z + (sent - z).detach())

    return Quantized


class Strided(nn.Module):
    """A bottleneck whose map has a quarter of the default's pixels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(64, 128, 3, padding=1, bias=False), nn.BatchNorm2d(128), nn.ReLU(),
            nn.Conv2d(128, channels, 3, stride=2, padding=1, bias=False))
        self.decoder = nn.Sequential(
            nn.BatchNorm2d(channels), nn.ConvTranspose2d(channels, 128, 2, stride=2, bias=False),
            nn.BatchNorm2d(128), nn.ReLU(),
            nn.Conv2d(128, 256, 3, padding=1, bias=False), nn.BatchNorm2d(256), nn.ReLU(),
            nn.Conv2d(256, 256, 3, padding=1, bias=False), nn.BatchNorm2d(256), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


class RateTerm:
    """A loss of squared errors and, times `weight`, the bits that the sent values would take.

    The bits are the entropy of each image's values among 2^RATE_BITS levels, where a value counts
    for the two levels beside it, so that there is a gradient. Training is quantization-aware:
    otherwise it would learn to send one extreme value and all others in one level, at no cost.
    """

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def bottleneck(self) -> nn.Module:
        bottleneck = quantized(RATE_BITS)()
        bottleneck.encoder.register_forward_hook(self.keep)
        return bottleneck

    def keep(self, encoder: nn.Module, inputs: tuple[Tensor], sent: Tensor) -> None:
        self.sent = sent

    def loss(self, student_maps, teacher_maps, layer_weights) -> tuple[Tensor, Tensor]:
        loss, errors = losses.ghnd_loss(student_maps, teacher_maps, layer_weights)
        values = self.sent.flatten(1)                                                 # (B, N)
        low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
        values = (values - low) / (high - low) * (2**RATE_BITS - 1)
        levels = [(1 - (values - i).abs()).relu().mean(1) for i in range(2**RATE_BITS)]
        entropy = torch.special.entr(torch.stack(levels)).sum() / np.log(2)  # bits a value, summed
        return loss + self.weight * values.shape[1] * entropy, errors


# ---- as rows of the study ------------------------------------------------------------------------


def qat_rows(base: train.Experiment, batches: int) -> list[Row]:
    """Quantization-aware training from the first step on, and in the last third alone."""
    rows = []
    for name, first_batch in (("from the start", 0), ("in the last third", batches * 2 // 3)):
        rows += [Row(f"QAT {name}, {distributed.plural(bits, 'bit')}", base, (bits,),
                     f"QAT {name}", quantized(bits, first_batch)) for bits in (1, 2, 3, 4)]
    return rows


def strided_rows(base: train.Experiment, batches: int) -> list[Row]:
    """A bottleneck that shrinks the map, with half as many values as the default, and a quarter."""
    return [Row(f"strided, {channels} channels", base, (8, 4, 2),
                f"strided, {channels} channels", partial(Strided, channels))
            for channels in (6, 3)]


def rate_rows(base: train.Experiment, batches: int) -> list[Row]:
    """Quantization-aware training with a rate term, for three lambdas."""
    terms = [RateTerm(weight) for weight in LAMBDAS]
    return [Row(f"rate term, lambda {term.weight:g}", base, (RATE_BITS,),
                f"rate term, {distributed.plural(RATE_BITS, 'bit')}", term.bottleneck, term.loss)
            for term in terms]


def hnd_rows(base: train.Experiment, batches: int) -> list[Row]:
    """GHND and HND, trained three times as long, and validated after each epoch."""
    longer = replace(base, epochs=3 * base.epochs, lr_drops=(2 * base.epochs,))
    hnd = replace(longer, layer_weights=(1, 0, 0, 0))
    return [Row(GHND_LONGER, longer, limit_val=None), Row(HND_LONGER, hnd, limit_val=None)]


EXPERIMENTS = {"qat": qat_rows, "strided": strided_rows, "rate": rate_rows, "hnd": hnd_rows}


def compare(ghnd: Sequence[dict[str, Any]], hnd: Sequence[dict[str, Any]]) -> None:
    """Print box AP by epoch, and GHND and HND of the same seeds compared after the last."""
    print("\n| epoch | GHND | HND |\n| --- | --- | --- |")
    by_epoch = zip(*(student["epochs"] for student in ghnd), strict=True)
    hnd_by_epoch = zip(*(student["epochs"] for student in hnd), strict=True)
    for epoch, aps in enumerate(zip(by_epoch, hnd_by_epoch, strict=True)):
        print(f"| {epoch} | {outcome.spread(aps[0])} | {outcome.spread(aps[1])} |")
    ghnd_aps, hnd_aps = ([student["rates"][0]["AP"] for student in row] for row in (ghnd, hnd))
    differences = np.subtract(ghnd_aps, hnd_aps)
    test = ttest_rel(ghnd_aps, hnd_aps)
    print(f"\nGHND - HND: {outcome.spread(differences)}, each "
          f"{' '.join(f'{difference:+.3f}' for difference in differences)}; paired t-test: "
          f"t = {test.statistic:.2f}, p = {test.pvalue:.3f}")


def main() -> None:
    parser = outcome.make_parser("Run the first experiments of a paper.")
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS),
                        help="which experiments")
    parser.add_argument("--paired-seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4],
                        help="of hnd, in place of --seeds")
    args = parser.parse_args()
    study = Study(args)
    distributed.log(f"teacher: box AP {study.teacher()['AP']:.3f}")
    plain = outcome.plain_row(study.base)
    rows = {plain: study.students(plain, args.seeds)}
    for name in args.only:
        seeds = args.paired_seeds if name == "hnd" else args.seeds
        for row in EXPERIMENTS[name](study.base, study.count_batches()):
            rows[row] = study.students(row, seeds)
    outcome.print_table(study, rows)
    outcome.draw_curves(study, rows, args.folder / "variants.jpg")
    students = {row.name: found for row, found in rows.items()}
    if GHND_LONGER in students:
        compare(students[GHND_LONGER], students[HND_LONGER])


if __name__ == "__main__":
    distributed.run(main)
