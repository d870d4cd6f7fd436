"""Recipes of published systems: each states the options that define its system."""

from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "experiments" / "recipes"
RECIPES = {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}

# Published values, option by option; each table names the files of the system that they were read from.

# rbgirshick/py-faster-rcnn: lib/fast_rcnn/config.py, experiments/cfgs/faster_rcnn_end2end.yml (background from 0),
# models/pascal_voc/VGG16/faster_rcnn_end2end/{solver,train}.prototxt, lib/rpn/generate_anchors.py (rounding),
# lib/rpn/proposal_layer.py (min_size times the image's scale), tools/test_net.py and lib/fast_rcnn/test.py.
PY_FASTER_RCNN: dict[str, Any] = {
    "trainer.max_steps": 70000,
    "trainer.accumulate_grad_batches": 2,
    "model.difficult": "drop",
    "model.training_scheme": "joint",
    "model.backbone.name": "vgg16",
    "model.backbone.frozen_stages": 2,
    "model.backbone.pool_size": 7,
    "model.backbone.dropout": 0.5,
    "model.anchors.base_size": 16,
    "model.anchors.scales": [8, 16, 32],
    "model.anchors.aspect_ratios": [0.5, 1, 2],
    "model.anchors.center_offset": "half_stride",
    "model.anchors.rounding": "base_sides",
    "model.anchors.order": "ratio_major",
    "model.anchors.straddling": "drop",
    "model.rpn.hidden_channels": 512,
    "model.rpn.objectness": "softmax",
    "model.rpn.init_std": 0.01,
    "model.rpn.positive_iou": 0.7,
    "model.rpn.negative_iou": 0.3,
    "model.rpn.best_per_object": True,
    "model.rpn.samples_per_image": 256,
    "model.rpn.positive_fraction": 0.5,
    "model.rpn.pre_nms_train": 12000,
    "model.rpn.post_nms_train": 2000,
    "model.rpn.pre_nms_test": 6000,
    "model.rpn.post_nms_test": 300,
    "model.rpn.nms_iou": 0.7,
    "model.rpn.min_side": 16,
    "model.rpn.min_side_scales": True,
    "model.rpn.reg_beta": 1 / 3**2,
    "model.rpn.reg_normalizer": "samples",
    "model.rpn.reg_weight": 1,
    "model.roi.samples_per_image": 128,
    "model.roi.positive_fraction": 0.25,
    "model.roi.positive_iou": 0.5,
    "model.roi.background_iou": [0, 0.5],
    "model.roi.append_gt": True,
    "model.roi.pooling": "roi_pool",
    "model.roi.delta_mean": [0, 0, 0, 0],
    "model.roi.delta_std": [0.1, 0.1, 0.2, 0.2],
    "model.roi.class_agnostic": False,
    "model.roi.class_weights": "none",
    "model.roi.ohem": False,
    "model.roi.score_init_std": 0.01,
    "model.roi.delta_init_std": 0.001,
    "model.roi.reg_beta": 1,
    "model.roi.reg_normalizer": "samples",
    "model.roi.reg_weight": 1,
    "model.roi.score_threshold": 0.05,
    "model.roi.nms": "hard",
    "model.roi.nms_iou": 0.3,
    "model.roi.detections_per_image": 100,
    "model.image.shortest_side": [600],
    "model.image.longest_side": 1000,
    "model.image.mean": [102.9801, 115.9465, 122.7717],
    "model.image.std": [1, 1, 1],
    "model.image.channel_order": "bgr",
    "model.image.pixel_max": 255,
    "model.optimizer.name": "sgd",
    "model.optimizer.lr": 0.001,
    "model.optimizer.momentum": 0.9,
    "model.optimizer.weight_decay": 0.0005,
    "model.optimizer.bias_lr_factor": 2,
    "model.optimizer.bias_decay": True,
    "model.optimizer.warmup_steps": 0,
    "model.optimizer.gamma": 0.1,
    "data.train_splits": ["2007_trainval"],
    "data.augmentation": "flip",
    "data.batch_size": 1,
}
TORCHVISION_IMAGES: dict[str, Any] = {
    "model.image.mean": [0.485, 0.456, 0.406],
    "model.image.std": [0.229, 0.224, 0.225],
    "model.image.channel_order": "rgb",
    "model.image.pixel_max": 1,
}
# tools/train_faster_rcnn_alt_opt.py (max_iters; rpn_generate: no limit before NMS; an image has at most 63 * 63 cells).
PY_FASTER_RCNN_ALTERNATING: dict[str, Any] = PY_FASTER_RCNN | {
    "trainer.max_steps": 80000 + 40000 + 80000 + 40000,
    "trainer.accumulate_grad_batches": 1,
    "model.training_scheme": "alternating",
    "model.alternating.step_shares": [80000, 40000, 80000, 40000],
    "model.alternating.restart_rpn": True,
    "model.rpn.pre_nms_train": 40000,
    "model.optimizer.milestones": [60 / 80],
}
# The tutorial "Guide to build Faster RCNN in PyTorch": its text and code from top to bottom.
STEP_BY_STEP: dict[str, Any] = {
    "model.backbone.name": "vgg16",
    "model.backbone.frozen_stages": 0,
    "model.backbone.dropout": 0,
    "model.anchors.scales": [8, 16, 32],
    "model.anchors.aspect_ratios": [0.5, 1, 2],
    "model.anchors.center_offset": "half_stride",
    "model.anchors.rounding": "none",
    "model.anchors.straddling": "drop",
    "model.rpn.hidden_channels": 512,
    "model.rpn.objectness": "softmax",
    "model.rpn.init_std": 0.01,
    "model.rpn.pre_nms_train": 12000,
    "model.rpn.post_nms_train": 2000,
    "model.rpn.pre_nms_test": 6000,
    "model.rpn.post_nms_test": 300,
    "model.rpn.min_side": 16,
    "model.rpn.min_side_scales": False,
    "model.rpn.reg_normalizer": "positives",
    "model.rpn.reg_weight": 10,
    "model.roi.samples_per_image": 128,
    "model.roi.positive_fraction": 0.25,
    "model.roi.append_gt": False,
    "model.roi.pooling": "roi_pool_floor",
    "model.roi.delta_std": [1, 1, 1, 1],
    "model.roi.score_init_std": 0.01,
    "model.roi.delta_init_std": 0.01,
    "model.roi.reg_normalizer": "positives",
    "model.roi.reg_weight": 10,
    "model.image.shortest_side": [800],
}
# longcw/faster_rcnn_pytorch: train.py (steps, init 0.01, clipping, params[8:]), faster_rcnn/faster_rcnn.py (losses),
# rpn_msr/proposal_target_layer.py (jitter, hard samples), fast_rcnn/config.py, experiments/cfgs/faster_rcnn_end2end.yml
# (300 RoIs at 0.3, targets as they are), test.py (300 detections). Where not set, py-faster-rcnn's.
LONGCW: dict[str, Any] = PY_FASTER_RCNN | {
    "trainer.max_steps": 100000,
    "trainer.accumulate_grad_batches": 1,
    "trainer.gradient_clip_val": 10,
    "trainer.gradient_clip_algorithm": "norm",
    "model.difficult": "ignore",
    "model.rpn.reg_beta": 1,
    "model.rpn.reg_normalizer": "positives",
    "model.rpn.reg_weight": 10,
    "model.roi.samples_per_image": 300,
    "model.roi.positive_fraction": 0.3,
    "model.roi.background_iou": [0.1, 0.5],
    "model.roi.append_gt": "jittered",
    "model.roi.gt_jitter": 0.05,
    "model.roi.class_weights": "balanced",
    "model.roi.delta_std": [1, 1, 1, 1],
    "model.roi.delta_init_std": 0.01,
    "model.roi.reg_normalizer": "positives",
    "model.roi.reg_weight": 10,
    "model.roi.detections_per_image": 300,
    "model.optimizer.bias_lr_factor": 1,
    "model.optimizer.milestones": [0.6, 0.8],
}
# ijkguo/mx-rcnn: train.py (clipping, 10 epochs of images and mirror images, drop after 7), rcnn/config.py,
# net/symbol_vgg.py (sigma 3 over 256, sigma 1 over 128, dropout), rcnn/core/tester.py (detections). MXNet decays
# weights, not biases.
MX_RCNN: dict[str, Any] = {key: value for key, value in PY_FASTER_RCNN.items() if key != "trainer.max_steps"} | {
    "trainer.max_epochs": 2 * 10,
    "trainer.accumulate_grad_batches": 1,
    "trainer.gradient_clip_val": 5,
    "trainer.gradient_clip_algorithm": "value",
    "model.rpn.reg_normalizer": "samples_per_image",
    "model.roi.reg_normalizer": "samples_per_image",
    "model.roi.score_threshold": 0.001,
    "model.roi.detections_per_image": 300 * 20,
    "model.image.mean": [103.939, 116.779, 123.68],
    "model.optimizer.bias_lr_factor": 1,
    "model.optimizer.bias_decay": False,
    "model.optimizer.milestones": [7 / 10],
}
# chenyuntc/simple-faster-rcnn-pytorch: utils/config.py (14 epochs, no dropout), train.py (drop after 10), trainer.py,
# model/faster_rcnn.py (decay, biases, detections), model/utils/creator_tool.py, model/utils/bbox_tools.py (anchors),
# data/dataset.py (torchvision's images).
CHENYUNTC: dict[str, Any] = {
    **{key: value for key, value in PY_FASTER_RCNN.items() if key != "trainer.max_steps"},
    **TORCHVISION_IMAGES,
    "trainer.max_epochs": 14,
    "trainer.accumulate_grad_batches": 1,
    "model.backbone.weights": "imagenet",
    "model.backbone.dropout": 0,
    "model.anchors.rounding": "none",
    "model.roi.detections_per_image": 300 * 20,
    "model.optimizer.bias_decay": False,
}
# bubbliiiing/faster-rcnn-pytorch: train.py (Adam, 1e-4, cosine, 100 epochs, batches of 2), nets/frcnn_training.py (one
# anchor per object, half of the RoIs positive, sigma 1, divided by positives), nets/rpn.py (600; 3000 to 300; 16 pixels
# of the resized image), nets/classifier.py (0.001 and 0.01), nets/vgg16.py (without dropout), utils/anchors.py (from
# the corner, all used), utils/dataloader.py (0..1), voc_annotation.py (difficult), get_map.py (0.02 and 0.5).
BUBBLIIIING: dict[str, Any] = {
    **{key: CHENYUNTC[key] for key in CHENYUNTC if not key.startswith(("model.optimizer.", "model.backbone."))},
    "trainer.max_epochs": 100,
    "model.backbone.frozen_stages": 0,
    "model.anchors.center_offset": "zero",
    "model.anchors.straddling": "keep",
    "model.rpn.best_per_object": "one",
    "model.rpn.post_nms_train": 600,
    "model.rpn.pre_nms_test": 3000,
    "model.rpn.min_side_scales": False,
    "model.rpn.reg_beta": 1,
    "model.rpn.reg_normalizer": "positives",
    "model.roi.positive_fraction": 0.5,
    "model.roi.reg_normalizer": "positives",
    "model.roi.score_threshold": 0.02,
    "model.roi.nms_iou": 0.5,
    "model.image.longest_side": 10000,
    "model.image.mean": [0, 0, 0],
    "model.image.std": [1, 1, 1],
    "model.optimizer.name": "adamw",
    "model.optimizer.lr": 0.0001,
    "model.optimizer.weight_decay": 0,
    "model.optimizer.schedule": "cosine",
    "data.train_splits": ["2007_trainval", "2012_trainval"],
    "data.augmentation": "photometric",
    "data.batch_size": 2,
}
# facebookresearch/detectron2: detectron2/config/defaults.py, configs/Base-RCNN-{C4,FPN}.yaml,
# configs/PascalVOC-Detection/faster_rcnn_R_50_{C4,FPN}.yaml; data/datasets/pascal_voc.py (difficult), modeling/
# anchor_generator.py (order), modeling/proposal_generator/rpn.py and roi_heads/fast_rcnn.py (normalisers, init).
DETECTRON2: dict[str, Any] = {
    **TORCHVISION_IMAGES,
    "trainer.max_steps": 18000,
    "model.difficult": "keep",
    "model.backbone.frozen_stages": 2,
    "model.backbone.norm": "frozen",
    "model.anchors.base_size": 1,
    "model.anchors.aspect_ratios": [0.5, 1, 2],
    "model.anchors.center_offset": "zero",
    "model.anchors.rounding": "none",
    "model.anchors.order": "scale_major",
    "model.anchors.straddling": "keep",
    "model.rpn.hidden_channels": 0,
    "model.rpn.objectness": "sigmoid",
    "model.rpn.init_std": 0.01,
    "model.rpn.positive_iou": 0.7,
    "model.rpn.negative_iou": 0.3,
    "model.rpn.best_per_object": True,
    "model.rpn.samples_per_image": 256,
    "model.rpn.positive_fraction": 0.5,
    "model.rpn.post_nms_test": 1000,
    "model.rpn.nms_iou": 0.7,
    "model.rpn.min_side": 0,
    "model.rpn.reg_beta": 0,
    "model.rpn.reg_normalizer": "samples_per_image",
    "model.roi.samples_per_image": 512,
    "model.roi.positive_fraction": 0.25,
    "model.roi.background_iou": [0, 0.5],
    "model.roi.append_gt": True,
    "model.roi.pooling": "roi_align",
    "model.roi.sampling_ratio": 0,
    "model.roi.delta_std": [1 / 10, 1 / 10, 1 / 5, 1 / 5],
    "model.roi.score_init_std": 0.01,
    "model.roi.delta_init_std": 0.001,
    "model.roi.reg_beta": 0,
    "model.roi.reg_normalizer": "samples",
    "model.roi.score_threshold": 0.05,
    "model.roi.nms_iou": 0.5,
    "model.roi.detections_per_image": 100,
    "model.image.shortest_side": list(range(480, 801, 32)),
    "model.image.longest_side": 1333,
    "model.optimizer.lr": 0.02,
    "model.optimizer.momentum": 0.9,
    "model.optimizer.weight_decay": 0.0001,
    "model.optimizer.bias_lr_factor": 1,
    "model.optimizer.bias_decay": True,
    "model.optimizer.warmup_steps": 100,
    "model.optimizer.warmup_start": 0.001,
    "data.train_splits": ["2007_trainval", "2012_trainval"],
    "data.batch_size": 16 // 8,
}
# open-mmlab/mmdetection 2.13: configs/dynamic_rcnn/dynamic_rcnn_r50_fpn_1x_coco.py; of configs/_base_/
# models/faster_rcnn_r50_fpn.py, schedules/schedule_1x.py, datasets/coco_detection.py; in mmdet/
# models/roi_heads/dynamic_roi_head.py and core/anchor/anchor_generator.py (order, centres).
DYNAMIC_RCNN: dict[str, Any] = {
    **TORCHVISION_IMAGES,
    "trainer.max_epochs": 12,
    "model.backbone.name": "resnet50_fpn",
    "model.backbone.frozen_stages": 2,
    "model.backbone.pool_size": 7,
    "model.backbone.fpn_channels": 256,
    "model.backbone.box_head_channels": 1024,
    "model.anchors.base_size": 1,
    "model.anchors.scales": [[8 * 4], [8 * 8], [8 * 16], [8 * 32], [8 * 64]],
    "model.anchors.aspect_ratios": [0.5, 1, 2],
    "model.anchors.center_offset": "zero",
    "model.anchors.rounding": "none",
    "model.anchors.order": "ratio_major",
    "model.anchors.straddling": "keep",
    "model.rpn.matcher": "iou",
    "model.rpn.objectness": "sigmoid",
    "model.rpn.positive_iou": 0.7,
    "model.rpn.negative_iou": 0.3,
    "model.rpn.best_per_object": True,
    "model.rpn.samples_per_image": 256,
    "model.rpn.positive_fraction": 0.5,
    "model.rpn.pre_nms_train": 2000,
    "model.rpn.post_nms_train": 1000,
    "model.rpn.pre_nms_test": 1000,
    "model.rpn.post_nms_test": 1000,
    "model.rpn.nms_iou": 0.85,
    "model.rpn.min_side": 0,
    "model.rpn.reg_beta": 0,
    "model.rpn.reg_normalizer": "samples",
    "model.roi.matcher": "dynamic",
    "model.roi.samples_per_image": 512,
    "model.roi.positive_fraction": 0.25,
    "model.roi.append_gt": True,
    "model.roi.pooling": "roi_align",
    "model.roi.sampling_ratio": 0,
    "model.roi.delta_std": [0.1, 0.1, 0.2, 0.2],
    "model.roi.class_agnostic": False,
    "model.roi.reg_loss": "smooth_l1",
    "model.roi.reg_beta": 1,
    "model.roi.reg_normalizer": "samples",
    "model.roi.score_threshold": 0.05,
    "model.roi.nms_iou": 0.5,
    "model.roi.detections_per_image": 100,
    "model.image.shortest_side": [800],
    "model.image.longest_side": 1333,
    "model.image.pad_multiple": 32,
    "model.optimizer.lr": 0.02,
    "model.optimizer.momentum": 0.9,
    "model.optimizer.weight_decay": 0.0001,
    "model.optimizer.warmup_steps": 500,
    "model.optimizer.warmup_start": 0.001,
    "data.augmentation": "flip",
    "data.batch_size": 2,
}
# torchvision: the defaults of models/detection/faster_rcnn.py; its networks are compared number by number elsewhere.
TORCHVISION: dict[str, Any] = {
    **TORCHVISION_IMAGES,
    "model.anchors.straddling": "keep",
    "model.anchors.order": "ratio_major",
    "model.anchors.rounding": "nearest",
    "model.rpn.objectness": "sigmoid",
    "model.rpn.positive_iou": 0.7,
    "model.rpn.negative_iou": 0.3,
    "model.rpn.samples_per_image": 256,
    "model.rpn.nms_iou": 0.7,
    "model.rpn.reg_beta": 1 / 9,
    "model.roi.samples_per_image": 512,
    "model.roi.positive_fraction": 0.25,
    "model.roi.sampling_ratio": 2,
    "model.roi.delta_std": [1 / 10, 1 / 10, 1 / 5, 1 / 5],
    "model.roi.score_threshold": 0.05,
    "model.roi.nms_iou": 0.5,
    "model.roi.detections_per_image": 100,
}
# open-mmlab/mmdetection: configs/_base_/models/cascade-rcnn_r50_fpn.py, configs/_base_/schedules/schedule_1x.py,
# mmdet/models/dense_heads/anchor_head.py and roi_heads/bbox_heads/bbox_head.py (normalisers, init).
CASCADE: dict[str, Any] = {
    **TORCHVISION_IMAGES,
    "trainer.max_epochs": 12,
    "model.difficult": "drop",
    "model.backbone.name": "resnet50_fpn",
    "model.backbone.frozen_stages": 2,
    "model.backbone.norm": "frozen",
    "model.backbone.pool_size": 7,
    "model.backbone.fpn_channels": 256,
    "model.backbone.box_head": "two_fc",
    "model.backbone.box_head_channels": 1024,
    "model.anchors.base_size": 1,
    "model.anchors.scales": [[8 * stride] for stride in (4, 8, 16, 32, 64)],
    "model.anchors.aspect_ratios": [0.5, 1, 2],
    "model.anchors.center_offset": "zero",
    "model.anchors.rounding": "none",
    "model.anchors.straddling": "drop",
    "model.rpn.hidden_channels": 0,
    "model.rpn.objectness": "sigmoid",
    "model.rpn.init_std": 0.01,
    "model.rpn.positive_iou": 0.7,
    "model.rpn.negative_iou": 0.3,
    "model.rpn.best_per_object": True,
    "model.rpn.samples_per_image": 256,
    "model.rpn.positive_fraction": 0.5,
    "model.rpn.pre_nms_train": 2000,
    "model.rpn.post_nms_train": 2000,
    "model.rpn.pre_nms_test": 1000,
    "model.rpn.post_nms_test": 1000,
    "model.rpn.nms_iou": 0.7,
    "model.rpn.min_side": 0,
    "model.rpn.reg_beta": 1 / 9,
    "model.rpn.reg_normalizer": "samples",
    "model.roi.samples_per_image": 512,
    "model.roi.positive_fraction": 0.25,
    "model.roi.positive_iou": 0.5,
    "model.roi.background_iou": [0, 0.5],
    "model.roi.append_gt": True,
    "model.roi.pooling": "roi_align",
    "model.roi.sampling_ratio": 0,
    "model.roi.class_agnostic": True,
    "model.roi.cascade_ious": [0.5, 0.6, 0.7],
    "model.roi.cascade_delta_std": [[0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067]],
    "model.roi.cascade_weights": [1, 0.5, 0.25],
    "model.roi.delta_std": [0.1, 0.1, 0.2, 0.2],
    "model.roi.score_init_std": 0.01,
    "model.roi.delta_init_std": 0.001,
    "model.roi.reg_beta": 1,
    "model.roi.reg_normalizer": "samples",
    "model.roi.score_threshold": 0.05,
    "model.roi.nms_iou": 0.5,
    "model.roi.detections_per_image": 100,
    "model.image.shortest_side": [800],
    "model.image.longest_side": 1333,
    "model.image.pad_multiple": 32,
    "model.optimizer.lr": 0.02,
    "model.optimizer.momentum": 0.9,
    "model.optimizer.weight_decay": 0.0001,
    "model.optimizer.bias_lr_factor": 1,
    "model.optimizer.bias_decay": True,
    "model.optimizer.warmup_steps": 500,
    "model.optimizer.warmup_start": 0.001,
    "data.batch_size": 16 // 8,
}
# open-mmlab/mmdetection: configs/convnext/mask-rcnn_convnext-t-p4-w7_fpn_amp-ms-crop-3x_coco.py, else as its Faster
# R-CNN, and mmdet/engine/optimizers/layer_decay_optimizer_constructor.py (nothing of one dimension decays).
CONVNEXT: dict[str, Any] = {
    "trainer.max_epochs": 36,
    "model.backbone.name": "timm",
    "model.backbone.model": "convnext_tiny.fb_in1k",
    "model.backbone.frozen_stages": 0,
    "model.backbone.drop_path": 0.4,
    "model.image.shortest_side": list(range(480, 801, 32)),
    "model.image.longest_side": 1333,
    "model.optimizer.name": "adamw",
    "model.optimizer.lr": 0.0001,
    "model.optimizer.weight_decay": 0.05,
    "model.optimizer.bias_decay": False,
    "model.optimizer.norm_decay": False,
    "model.optimizer.warmup_steps": 1000,
    "model.optimizer.warmup_start": 0.001,
}
MMDETECTION: dict[str, Any] = DYNAMIC_RCNN | {  # mmdetection's Faster R-CNN, on which its Dynamic R-CNN stands
    "model.roi.matcher": "iou",
    "model.roi.positive_iou": 0.5,
    "model.roi.background_iou": [0, 0.5],
    "model.roi.reg_beta": 0,
    "model.rpn.nms_iou": 0.7,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "cascade_rcnn_resnet50_fpn": CASCADE,
    "py_faster_rcnn_vgg16": PY_FASTER_RCNN,
    "py_faster_rcnn_vgg16_alternating": PY_FASTER_RCNN_ALTERNATING,
    "step_by_step_vgg16": STEP_BY_STEP,
    "longcw_vgg16": LONGCW,
    "mx_rcnn_vgg16": MX_RCNN,
    "chenyuntc_vgg16": CHENYUNTC,
    "bubbliiiing_vgg16": BUBBLIIIING
    | {"model.backbone.name": "vgg16", "model.backbone.pool_size": 7, "model.backbone.dropout": 0},
    "bubbliiiing_resnet50": BUBBLIIIING
    | {
        "model.backbone.name": "resnet50_c4",
        "model.backbone.norm": "frozen",
        "model.backbone.pool_size": 14,
        "model.backbone.box_head_stride": 2,
    },
    "detectron2_resnet50_c4": DETECTRON2
    | {
        "model.backbone.name": "resnet50_c4",
        "model.backbone.pool_size": 14,
        "model.anchors.scales": [32, 64, 128, 256, 512],
        "model.rpn.pre_nms_train": 12000,
        "model.rpn.post_nms_train": 2000,
        "model.rpn.pre_nms_test": 6000,
    },
    "detectron2_resnet50_fpn": DETECTRON2
    | {
        "model.backbone.name": "resnet50_fpn",
        "model.backbone.pool_size": 7,
        "model.backbone.fpn_channels": 256,
        "model.backbone.box_head_channels": 1024,
        "model.anchors.scales": [[32], [64], [128], [256], [512]],
        "model.rpn.pre_nms_train": 2000,
        "model.rpn.post_nms_train": 1000,
        "model.rpn.pre_nms_test": 1000,
    },
    "dynamic_rcnn_resnet50_fpn": DYNAMIC_RCNN,
    "mmdetection_resnet50_fpn": MMDETECTION,
    "faster_rcnn_convnext_tiny_fpn": MMDETECTION | CONVNEXT,
    "torchvision_resnet50_fpn": TORCHVISION | {"model.image.shortest_side": [800], "model.rpn.score_threshold": 0},
    "torchvision_resnet50_fpn_v2": TORCHVISION | {"model.backbone.box_head": "conv_fc", "model.rpn.conv_depth": 2},
    "torchvision_mobilenet_v3_large_320_fpn": TORCHVISION
    | {"model.image.shortest_side": [320], "model.rpn.score_threshold": 0.05, "model.rpn.post_nms_test": 150},
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_states_what_the_system_published(resolve_first_line, name):
    options = resolve_first_line(RECIPES[name])
    stated = {key: options[key] for key in PUBLISHED[name]}
    assert stated == {key: _about(value) for key, value in PUBLISHED[name].items()}


def _about(value: Any) -> Any:
    return pytest.approx(value, rel=1e-9) if isinstance(value, float) else value


@pytest.mark.parametrize(
    ("name", "milestones"),
    [
        ("py_faster_rcnn_vgg16", [50 / 70]),
        ("chenyuntc_vgg16", [10 / 14]),
        ("detectron2_resnet50_c4", [12 / 18, 16 / 18]),
        ("detectron2_resnet50_fpn", [12 / 18, 16 / 18]),
        ("cascade_rcnn_resnet50_fpn", [8 / 12, 11 / 12]),
        ("dynamic_rcnn_resnet50_fpn", [8 / 12, 11 / 12]),
        ("mmdetection_resnet50_fpn", [8 / 12, 11 / 12]),
        ("faster_rcnn_convnext_tiny_fpn", [27 / 36, 33 / 36]),
    ],
)
def test_learning_rate_drops_where_published(resolve_first_line, name, milestones):
    assert resolve_first_line(RECIPES[name]).model.optimizer.milestones == pytest.approx(milestones, abs=1e-4)


def test_learning_rates_of_stages_are_near_those_of_mmdetections_layers(resolve_first_line):
    """Of its layers 0 to 6 in 8 - 1 - n powers of 0.95: stem, stages 1 and 2, three parts of stage 3, and stage 4."""
    theirs = [0.95**6, 0.95**5, (0.95**4 + 0.95**3 + 0.95**2) / 3, 0.95]
    decay = resolve_first_line(RECIPES["faster_rcnn_convnext_tiny_fpn"]).model.optimizer.layer_decay
    assert [decay**power for power in (4, 3, 2, 1)] == pytest.approx(theirs, abs=0.04)


def test_every_system_has_a_recipe():
    assert set(RECIPES) <= set(PUBLISHED)
    assert {name for name in PUBLISHED if not name.startswith("torchvision_")} <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_header_says_system_and_reported_result(name):
    lines = RECIPES[name].read_text().splitlines()
    header = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    assert header[1].startswith("# System: ")
    assert sum(line.startswith("# Reported: ") for line in header) == 1
