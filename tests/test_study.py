import copy
from unittest.mock import Mock

import convert
import drawn
import pytest
import study
import torch
from conftest import CPU, same
from PIL import Image

import data
import models
import train
from distributed import InputError

VAL = "annotations/instances_val2017.json"


def train_on(teacher, training_bodies, layer_weights):
    """Train a student on three batches, the last of images of both others; return its state."""
    torch.manual_seed(0)
    images = list(torch.randint(256, (8, 3, 64, 96), dtype=torch.uint8))
    student = models.build_student(teacher).train()
    optimizer, _ = train.build_optimizer(student, train.EXPERIMENTS["fasterrcnn"])
    bodies = training_bodies(student, teacher, False, len(layer_weights))
    for batch in (images[:4], images[4:], [images[i] for i in (6, 1, 4, 3)]):
        train.train_step(
            *bodies, teacher.transform, [batch], optimizer, layer_weights=layer_weights)
    return student.state_dict()


def test_with_kept_teacher_maps_training_is_the_same_to_the_last_bit(teachers):
    computed = []

    def counting_bodies(*args):
        student_body, teacher_body = models.training_bodies(*args)
        teacher_body.register_forward_hook(lambda *hooked: computed.append(hooked))
        return student_body, teacher_body

    teacher = models.load_teacher("fasterrcnn", teachers["fasterrcnn"], 64, 96)
    models.to_device(teacher, CPU)
    keeping_bodies = study.keep_teacher_maps(counting_bodies)
    for layer_weights in ([1, 1, 1, 1], [1]):
        plain = train_on(teacher, models.training_bodies, layer_weights)
        assert same(train_on(teacher, keeping_bodies, layer_weights), plain)
        assert len(computed) == 2


def test_a_result_is_kept_when_it_is_finished(tmp_path):
    file, failing = tmp_path / "a.json", Mock(side_effect=KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        study.once(file, {"epochs": 3}, failing)
    assert study.once(file, {"epochs": 3}, lambda n: [{"AP": n}], 0.5) == [{"AP": 0.5}]
    assert study.once(file, {"epochs": 3}, failing) == [{"AP": 0.5}]
    assert list(tmp_path.iterdir()) == [file]


def test_quantization_aware_training_starts_at_its_step_and_passes_gradients_on():
    torch.manual_seed(0)
    bottleneck = study.quantized(2, first_step=2)().train()
    encoded, sent = [], []
    bottleneck.encoder.register_forward_hook(lambda module, x, z: encoded.append(z))
    bottleneck.decoder.register_forward_pre_hook(lambda module, z: sent.append(*z))
    x = torch.rand(2, 64, 8, 8)
    outputs = [bottleneck(x) for _ in range(3)]
    assert torch.equal(sent[1], encoded[1]) and not torch.equal(outputs[1], outputs[2])
    wanted = [models.dequantize(*models.quantize(image, 2)) for image in encoded[2]]
    torch.testing.assert_close(sent[2], torch.stack(wanted))
    gradients = torch.autograd.grad(outputs[2].sum(), (encoded[2], sent[2]))
    assert torch.equal(*gradients) and gradients[0].abs().sum() > 0


def test_a_study_trains_both_alike_and_makes_a_table_and_a_figure_once(
        tmp_path, capsys, monkeypatch):
    build, read, step = models.build_student, data.CocoImages.__getitem__, torch.optim.Adam.step
    starts, keys, rates = [], {"train2017": [], "val2017": []}, []
    monkeypatch.setattr(models, "build_student", lambda *args: (
        starts.append(build(*args)) or copy.deepcopy(starts[-1])))
    monkeypatch.setattr(data.CocoImages, "__getitem__", lambda images, key: (
        keys[images.folder.name].append(key) or read(images, key)))
    monkeypatch.setattr(torch.optim.Adam, "step", lambda optimizer, *args: (
        rates.append(optimizer.param_groups[0]["lr"]) or step(optimizer, *args)))
    monkeypatch.setattr(study, "BITS", [32, 2])
    monkeypatch.setattr(study, "QUALITIES", [10])
    drawn.write_dataset(tmp_path, train=9, val=9)
    flags = (f"--arch fasterrcnn --data-dir {tmp_path} --folder {tmp_path} --teacher-steps 1 "
             "--epochs 2 --min-size 64 --max-size 96 --every 10 --seeds 3 --only ghnd torchdistill")
    study.main(flags.split())
    ours, _, theirs = (student.state_dict() for student in starts)  # between them ours is reloaded
    assert same(ours, theirs)
    ours, theirs = keys["train2017"][:16], keys["train2017"][16:]  # 2 epochs of 2 batches of 4
    assert ours == theirs and ours[:8] != ours[8:]
    assert rates[1:5] == rates[5:] == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4])

    table = capsys.readouterr().out.partition("\n| what")[2]
    assert "ghnd - torchdistill, seed by seed: " in table
    for row in ("teacher, JPEG 10", "ghnd, 32-bit", "ghnd, 2-bit", "torchdistill, 32-bit"):
        assert f"\n| {row} | " in table
    assert Image.open(tmp_path / "study.jpg").width == 700
    assert {path.name for path in tmp_path.rglob("*.pt")} == {"teacher.pt"}
    study.main([*flags.split(), "--seeds", "3", "3"])
    before, _, again = capsys.readouterr().out.partition("\n| what")
    assert before.count("\n") == 1 and again == table  # the line is of images left out
    with pytest.raises(InputError, match="ghnd-3.json was made with .*'epochs': 2.* not .*: 3"):
        study.main([*flags.split(), "--epochs", "3"])


def test_a_mean_has_its_deviation_and_each_value():
    assert study.describe([0.5]) == "0.500"
    assert study.describe([0.1, -0.0], "+") == "+0.050 ± 0.071 (+0.100 -0.000)"


@pytest.mark.parametrize("side, ids", [(None, [1, 2, 3, 4, 5]), (20, [1, 2, 3, 4])])
def test_masks_in_files_are_converted(side, ids, tmp_path):
    for number in range(6):
        folder = tmp_path / "source" / f"image-{number}"
        (folder / "images").mkdir(parents=True)
        (folder / "masks").mkdir()
        size = (30, 20) if number == 5 else (20, 20)
        colour = (9, 9, 9) if number == 0 else (9, 8, 7)
        Image.new("RGB", size, colour).save(folder / "images" / "x.png")
        for name, corners in {"object": (5, 3, 9, 15), "slip": (0, 0, 3, 3)}.items():
            mask = Image.new("L", size)
            mask.paste(255, corners)
            mask.save(folder / "masks" / f"{name}.png")
        Image.new("L", (7, 7), 255).save(folder / "masks" / "other-size.png")

    convert.convert_masks(tmp_path / "source", tmp_path / "coco", side)
    images, folder = data.load_train_split(tmp_path / "coco", 64)
    assert [info.id for info in images] == ids
    assert [Image.open(folder / info.file_name).mode for info in images[:2]] == ["L", "RGB"]
    content = data.read_annotations(tmp_path / "coco" / VAL, 2, masks=True)
    assert [(a["image_id"], a["bbox"], a["area"]) for a in content["annotations"]
            ] == [(1, [5, 3, 4, 12], 48)]


VOC = """<annotation><object><name>wolf</name><difficult>1</difficult>
<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>64</xmax><ymax>48</ymax></bndbox></object>
<object><name>bear</name><bndbox><xmin>11</xmin><ymin>21</ymin><xmax>30</xmax><ymax>21</ymax></bndbox>
</object></annotation>"""


def test_boxes_in_vocs_layout_are_converted(tmp_path):
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (tmp_path / "voc" / folder).mkdir(parents=True)
    for name, split in (("a", "trainval"), ("b", "test")):
        (tmp_path / "voc" / "Annotations" / f"{name}.xml").write_text(VOC)
        (tmp_path / "voc" / "ImageSets" / "Main" / f"{split}.txt").write_text(name + "\n")
        Image.new("RGB", (64, 48)).save(tmp_path / "voc" / "JPEGImages" / f"{name}.jpg")
    convert.convert_voc(tmp_path / "voc", tmp_path / "coco")
    images, _ = data.load_train_split(tmp_path / "coco", 64)
    assert images == [(1, "a.jpg", 64, 48)]
    content = data.read_annotations(tmp_path / "coco" / VAL, 3, masks=False)
    assert content["categories"] == [{"id": 1, "name": "bear"}, {"id": 2, "name": "wolf"}]
    assert [(a["category_id"], a["bbox"], a["area"], a["iscrowd"]) for a in content["annotations"]
            ] == [(2, [0, 0, 64, 48], 3072, 1), (1, [10, 20, 20, 1], 20, 0)]
