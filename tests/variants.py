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
import outcome  # first: it puts the scripts on the path
import torch
from outcome import Row, Study
from scipy.stats import ttest_rel
from torch import Tensor, nn

import distributed
import losses
import models

LAMBDAS = (0.1, 0.3, 1)  # of the rate term: the squared error that one bit is worth
RATE_BITS = 4

# ---- the experiments -----------------------------------------------------------------------------


def quantized(
    bits: int, first_step: int = 0, base: type[nn.Module] = models.Bottleneck
) -> type[nn.Module]:
    """Return a bottleneck class that trains with what will be sent, quantized for each image.

    Gradients pass straight through.
    first_step: until then it trains as usual. Its BatchNorm layers count the steps.
    base: the class without quantization; its decoder begins with BatchNorm.
    """

    class Quantized(base):
        def forward(self, x: Tensor) -> Tensor:
            z = self.encoder(x)
            if self.training and self.decoder[0].num_batches_tracked < first_step:
                return self.decoder(z)
            sent = torch.stack([models.dequantize(*models.quantize(image, bits)) for image in z])
            return self.decoder(z + (sent - z).detach())

    return Quantized


class Strided(nn.Module):
    """A bottleneck whose map has a quarter of the default's pixels.

    Its decoder has twice as many weights as the default's, 888,000, and its encoder half, 81,000.
    """

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
    """A loss of squared errors and, times `weight`, an estimate of the bits that are sent.

    The estimate is the entropy of each image's values among 2^RATE_BITS levels from its smallest to
    its largest. A value counts for the two levels beside it, so that there is a gradient.
    Training is quantization-aware: otherwise one extreme value could push all others into one
    level, which costs no bits, and no error while nothing is quantized.
    """

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def bottleneck(self) -> nn.Module:
        bottleneck = quantized(RATE_BITS)()
        bottleneck.encoder.register_forward_hook(self.keep)
        return bottleneck

    def keep(self, encoder: nn.Module, inputs: tuple[Tensor], encoded: Tensor) -> None:
        self.encoded = encoded

    def loss(self, student_maps, teacher_maps, layer_weights) -> tuple[Tensor, Tensor]:
        loss, errors = losses.ghnd_loss(student_maps, teacher_maps, layer_weights)
        values = self.encoded.flatten(1)                                          # (B, N)
        low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
        values = (values - low) / (high - low).clamp(min=1e-6) * (2**RATE_BITS - 1)
        shares = [(1 - (values - i).abs()).relu().mean(1) for i in range(2**RATE_BITS)]
        entropy = torch.special.entr(torch.stack(shares)).sum() / np.log(2)       # of B images
        return loss + self.weight * values.shape[1] * entropy, errors


# ---- as rows of the study ------------------------------------------------------------------------


def qat_row(study: Study, bits: int, first_step: int, name: str) -> Row:
    return Row(f"QAT {name}, {distributed.plural(bits, 'bit')}", study.base, (bits,),
               f"QAT {name}", quantized(bits, first_step))


def qat_rows(study: Study) -> list[Row]:
    """Quantization-aware training from the first step on, and in the last third alone."""
    starts = {"from the start": 0, "in the last third": study.count_steps() * 2 // 3}
    return [qat_row(study, bits, first_step, name)
            for name, first_step in starts.items() for bits in (1, 2, 3, 4)]


def strided_rows(study: Study) -> list[Row]:
    """A bottleneck that shrinks the map, with half as many values as the default, and a quarter.

    The former also with quantization-aware training.
    """
    rows = [Row(f"strided, {channels} channels", study.base, (8, 4, 2),
                f"strided, {channels} channels", partial(Strided, channels))
            for channels in (6, 3)]
    for bits in (2, 3, 4):
        rows.append(Row(
            f"strided, 6 channels, QAT, {distributed.plural(bits, 'bit')}", study.base, (bits,),
            "strided, 6 channels, QAT", partial(quantized(bits, base=Strided), 6)))
    return rows


def rate_rows(study: Study) -> list[Row]:
    """A rate term, with three lambdas; the first row has none."""
    rows = [qat_row(study, RATE_BITS, 0, "from the start")]
    for weight in LAMBDAS:
        term = RateTerm(weight)
        rows.append(Row(f"rate term, lambda {weight:g}", study.base, (RATE_BITS,),
                        f"rate term, {RATE_BITS} bits", term.bottleneck, term.loss))
    return rows


def hnd_rows(study: Study) -> list[Row]:
    """GHND and HND, trained for twice as many epochs as others, and evaluated after each."""
    epochs = 2 * study.base.epochs
    ghnd = replace(study.base, epochs=epochs, lr_drops=outcome.lr_drops(epochs))
    hnd = replace(ghnd, layer_weights=(1, 0, 0, 0))
    return [Row("GHND, trained longer", ghnd, by_epoch=True),
            Row("HND, trained longer", hnd, by_epoch=True)]


EXPERIMENTS = {"qat": qat_rows, "strided": strided_rows, "rate": rate_rows, "hnd": hnd_rows}


def compare(ghnd: Sequence[dict[str, Any]], hnd: Sequence[dict[str, Any]]) -> None:
    """Print box AP by epoch, and GHND and HND of the same seeds compared after the last."""
    print("\n| epoch | GHND | HND |\n| --- | --- | --- |")
    ghnd_epochs, hnd_epochs = (zip(*(student["epochs"] for student in students), strict=True)
                               for students in (ghnd, hnd))
    for epoch, aps in enumerate(zip(ghnd_epochs, hnd_epochs, strict=True)):
        print(f"| {epoch} | {outcome.spread(aps[0])} | {outcome.spread(aps[1])} |")
    ghnd_aps, hnd_aps = ([student["rates"][0]["AP"] for student in students]
                         for students in (ghnd, hnd))
    differences = np.subtract(ghnd_aps, hnd_aps)
    test = ttest_rel(ghnd_aps, hnd_aps)
    low, high = test.confidence_interval(0.95)
    print(f"\nGHND - HND: {outcome.spread(differences)}, each "
          f"{' '.join(f'{difference:+.3f}' for difference in differences)}; paired t-test: "
          f"t = {test.statistic:.2f}, p = {test.pvalue:.3f}, 95 % interval {low:+.3f} to {high:+.3f}")


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
    rows = {plain.name: (plain, study.students(plain, args.seeds))}  # two experiments share one
    for name in args.only:
        seeds = args.paired_seeds if name == "hnd" else args.seeds
        for row in EXPERIMENTS[name](study):
            rows[row.name] = (row, study.students(row, seeds))
    outcome.print_table(study, list(rows.values()))
    outcome.draw_curves(study, list(rows.values()), args.folder / "variants.jpg")
    if "hnd" in args.only:
        compare(*(rows[row.name][1] for row in hnd_rows(study)))


if __name__ == "__main__":
    distributed.run(main)
