"""The detectors and images that `frcnn benchmark train|infer` runs on."""

from dataclasses import replace

import pytest
import torch

from experiments.benchmark.measuring import CPU
from experiments.benchmark.models import CANDIDATES, build_network, chosen_networks, make_images, standard_network
from experiments.benchmark.options import InferOptions

SIZE = (96, 160)


def test_candidates_are_as_many_as_of_a_trained_detector() -> None:
    options = standard_network("mobilenet_v2_fpn", SIZE)
    options = replace(options, backbone=replace(options.backbone, box_head_channels=64))
    images, _ = batch = make_images(options.size, 1, 6, CPU)
    model = build_network(options, batch)[0]
    with torch.no_grad():
        features, image_batch = model.features(images)
        logits, _ = model.roi_heads(features, model.proposals(features, image_batch))
    found = (logits.softmax(dim=1)[:, 1:] > 0.05).sum().item()
    assert found == pytest.approx(CANDIDATES, rel=0.05)


def test_images_and_targets() -> None:
    images, targets = make_images((96, 160), 2, 30, CPU)
    assert [image.shape for image in images] == [(3, 96, 160)] * 2
    assert all(image.dtype == torch.uint8 for image in images)
    assert not torch.equal(images[0], images[1])
    for target in targets:
        x1, y1, x2, y2 = target["boxes"].T
        assert len(target["boxes"]) == len(target["labels"]) == 30
        assert (x1 >= 0).all() and (x2 > x1).all() and (x2 <= 160).all()
        assert (y1 >= 0).all() and (y2 > y1).all() and (y2 <= 96).all()
        assert x2.max() > 96


def test_options_of_an_experiment(tiny_config) -> None:
    options = ["model.rpn.post_nms_train=7", "model.image.shortest_side=[72]"]
    (chosen,) = chosen_networks(InferOptions(config=str(tiny_config), option=options))
    assert (chosen.name, chosen.size, chosen.rpn.post_nms_train) == ("tiny", (72, 96), 7)
    assert (chosen.anchors.scales, chosen.roi.samples_per_image) == ([1.0, 2.0], 16)


def test_sizes_of_named_networks() -> None:
    (own,) = chosen_networks(InferOptions(networks=["vgg16"]))
    (given,) = chosen_networks(InferOptions(networks=["vgg16"], size=[600, 1000]))
    assert (own.size, own.image.longest_side) == ((600, 800), 800)
    assert (given.size, given.image.longest_side, given.image.shortest_side) == ((600, 1000), 1000, [600])
